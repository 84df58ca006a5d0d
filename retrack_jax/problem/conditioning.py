"""The input that the network gets besides the noisy image and its time: none, a prompt's embedding, a caption or a label.

Captions are in captions.py, labels in labels.py.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from retrack_jax.config.recipes import UnlearnOptions
from retrack_jax.data.dataset import ImageSet
from retrack_jax.neighbors.captions import CaptionedNeighbors
from retrack_jax.notation import Array, PyTree
from retrack_jax.problem.target import Target
from retrack_jax.unlearn.options import MethodOptions
from retrack_jax.unlearn.streams import Anchor


class Conditioning:
    """What training and sampling ask, answered for a network that takes noisy images and timesteps alone.

    Attributes:
      of_target: whether samples, and so the pretrained model's too, depend on the target.
      dropout: the share of training examples whose own condition is dropped.
      dropped: the condition of such an example, leaves `[1, ...]`, or None; entries of a dict that it lacks stay the example's.
      null: the condition `[1, ...]` that guidance leads away from, or None.
      digests: name -> digest of what was read.
    """

    of_target: bool = False
    dropout: float = 0.0
    dropped: PyTree = None
    null: PyTree = None
    digests: dict[str, str] = {}

    def of_images(self, images: ImageSet) -> Callable[[np.ndarray], PyTree] | None:
        """Returns `rows [b] -> conditions`, leaves `[b, ...]`, if each of `images` has its own, else None."""
        return None

    def search(self, target: Target, own: MethodOptions) -> Callable[..., CaptionedNeighbors] | None:
        """Returns `(forget, remain, K, backend) -> neighbors` of the target's distinct images among those that remain; None: the
        search is by images alone.
        """
        return None

    def anchor(self, target: Target, similarity: np.ndarray | None, recipe: UnlearnOptions) -> Anchor | None:
        """Returns which distinct forgotten images follow the pretrained prediction, given `search`'s similarities `[F, K]`."""
        return None

    def table(self, target: Target) -> Array | None:
        """Returns the table that examples' conditions are rows of (train/step.py `Shared.conditions`), if there is one."""
        return None

    def remembered(self, target: Target) -> Array | None:
        """Returns the condition `[1, ...]` under which the model before unlearning would remember the target, if there is one: by
        default the one row of `table`.
        """
        return self.table(target)

    def sampled(self, target: Target) -> dict[str, PyTree]:
        """Returns name in `samples.npz` -> conditions of those samples, leaves `[P, ...]`: image i has the one at i mod P."""
        return {"samples": None}

    def of_forgotten(self, target: Target) -> np.ndarray | None:
        """Returns bool `[P]`, which conditions of `sampled` are drawn from forgotten images, if all are from images."""
        return None

    def digests_of(self, target: Target) -> dict[str, str]:
        """Returns name -> digest of what was chosen for this target, if anything was."""
        return {}

    def describe(self, name: str, target: Target) -> str:
        """Returns what the samples `name` depend on, to be part of their fingerprint."""
        return ""


class PairedPrompts(Conditioning):
    """A concept's two prompts: training is conditioned on the modified one, and samples are drawn of both.

    Image i of both starts from the same noise. The original prompt is the one that reproduced the memorised picture.

    Args:
      encode: a prompt to its embedding, float32 `[1, N, D]`.
      negative_prompt: what guidance leads away from.
      digest: of what encodes.
    """

    of_target = True

    def __init__(self, encode: Callable[[str], Array], negative_prompt: str, digest: str):
        self._encode, self._negative_prompt = functools.cache(encode), negative_prompt
        self.digests = {"text encoder in config.checkpoint": digest}

    @property
    def null(self) -> Array:
        """The condition that guidance leads away from, `[1, N, D]`."""
        return self._encode(self._negative_prompt)

    def table(self, target: Target) -> Array:
        return self._encode(target.concept.prompts["modified"])

    def remembered(self, target: Target) -> Array:
        return self._encode(target.concept.prompts["original"])

    def sampled(self, target: Target) -> dict[str, Array]:
        return {kind: self._encode(prompt) for kind, prompt in target.concept.prompts.items()}

    def describe(self, name: str, target: Target) -> str:
        return target.concept.prompts[name]


def with_conditions(gather: Callable, conditioning: Conditioning, images: ImageSet, rows: np.ndarray) -> Callable:
    """Returns `gather`, a codec's for the images of `rows`, with the condition of each example if it has one."""
    condition_of = conditioning.of_images(images)
    if condition_of is None:
        return gather
    return lambda positions: {**gather(positions), "condition": condition_of(rows[positions])}


def remembered_conditions(conditioning: Conditioning, target: Target, parts: Sequence[tuple[ImageSet, np.ndarray]]) -> PyTree:
    """Returns under which conditions the model remembers the images of `parts`, (set, rows) each.

    Leaves are `[N, ...]`, a row for each image; `[1, ...]`: the same for all; or there are none.
    """
    if conditioning.of_images(target.images) is None:
        return conditioning.remembered(target)
    conditions = [conditioning.of_images(images)(rows) for images, rows in parts]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *conditions)
