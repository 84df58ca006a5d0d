"""The training data of a problem: which images a target names, and a digest of each thing that was read."""

import dataclasses

import numpy as np

from retrack_jax import files
from retrack_jax.checks import check
from retrack_jax.config.options import DataOptions
from retrack_jax.data.dataset import ImageSet
from retrack_jax.data.left_out import resolve_remaining, split_held_out, unseen, without
from retrack_jax.data.sources.load import load_captioned_images, load_concepts, load_images
from retrack_jax.problem.target import Target, make_target


class ImageData:
    """One set of images, of which a target is any part.

    Attributes:
      images: the training images.
      held_out: those that no model trains on, or None.

    Args:
      captioned: whether each image needs a caption.
    """

    def __init__(self, options: DataOptions, captioned: bool = False):
        load = load_captioned_images if captioned else load_images
        self._training, held_out = split_held_out(load(dataclasses.asdict(options)), options.held_out)
        self.held_out = held_out and unseen(held_out, self._training)
        self._without_copies = self.held_out is not held_out
        self.images: ImageSet = without(self._training, options.exclude)

    def target(self, spec: str) -> Target:
        """Returns what `spec` names. Raises `UserError` for a name that is not there, or for everything at once."""
        forget = resolve_remaining(spec, self.images, self._training)
        return make_target(spec, self.images, forget, np.setdiff1d(np.arange(len(self.images)), forget))

    def digests(self, target: Target | None = None) -> dict[str, str]:
        """Returns name -> digest of what was read, and with a target of the rows that it names. Names stand in messages."""
        labels = None if self.images.labels is None else np.asarray(self.images.labels).tolist()
        read = {"images": self.images.digest, "names or labels": files.json_digest([list(self.images.ids), labels])}
        if self.images.captions is not None:
            read["captions"] = files.json_digest(list(self.images.captions))
        if self._without_copies:  # otherwise they follow from the images
            read["held-out images"] = self.held_out.digest
        return read if target is None else {**read, "forgotten images": files.array_digest(target.forget)}

    def describe(self, target: Target) -> dict:
        """Returns what provenance says of the data, as plain JSON."""
        return {"name": self.images.name, "digest": self.images.digest}


class ConceptData:
    """A folder of concepts, of which a target is one: its pictures with label 1 are forgotten, those with 0 remain.

    The model was trained on far more than the concepts, so there is no set of training images.
    """

    images = held_out = None

    def __init__(self, options: DataOptions):
        self._load = load_concepts(dataclasses.asdict(options))

    def target(self, spec: str) -> Target:
        """Returns a concept as a target. Raises `UserError` for a group, or for one without its folder, files or prompts."""
        check(
            not any(sign in spec for sign in "+*?[@") and not spec.startswith("label:"),
            f"the target {spec!r} is a group; one run forgets one concept, so name concepts and separate them by commas",
        )
        concept = self._load(spec)
        return make_target(spec, concept.images, concept.forget, concept.remain, concept)

    def digests(self, target: Target | None = None) -> dict[str, str]:
        """As `ImageData.digests`; without a target nothing was read."""
        if target is None:
            return {}
        return {
            "pictures": target.images.digest,
            "memorised picture": files.array_digest(target.concept.memorised),
            "labels of pictures": files.array_digest(target.forget),
            "prompts": files.json_digest(target.concept.prompts),
        }

    def describe(self, target: Target) -> dict:
        """As `ImageData.describe`."""
        concept = target.concept
        about = {"memorised": concept.memorised_name, "prompts": concept.prompts}
        return {"name": target.spec, "digest": target.images.digest, **about}
