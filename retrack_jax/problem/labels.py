"""Class labels: the label of each image, the null label, and a label of which no image remains.

    (1)  x_0 | x_t, c   the posterior over the remaining images of label c, which the retrained network predicts
    (2)  x_0 | x_t      the same over all of them: under the null label

So a forgotten image that is drawn under its label has neighbors with that label, and one that is drawn under the null label has
neighbors with any. If no image of label c remains, (1) is undefined; `config.unlearn.retrack.whole_class` then says what is
predicted.
"""

from collections.abc import Callable

import numpy as np

from retrack_jax import files
from retrack_jax.checks import check, check_int, shown
from retrack_jax.config.options import Options
from retrack_jax.config.recipes import UnlearnOptions
from retrack_jax.data.dataset import ImageSet
from retrack_jax.data.labels import remaining_of_labels
from retrack_jax.problem.conditioning import Conditioning
from retrack_jax.problem.target import Target
from retrack_jax.unlearn.streams import Anchor

_LABEL_DROPOUT = 0.1  # of classifier-free guidance (arXiv 2207.12598), and of DiT
_WHOLE_CLASS = {
    "null": "what the pretrained model predicts under the null label",
    "nearest": "the nearest remaining images of any label",
}


class Labels(Conditioning):
    """Every image is denoised under its own label, or under the null label, which stands for none.

    Args:
      images: the training images.
      num_labels: how many labels the network knows; None: any number.

    Raises:
      UserError: images without labels, or a label that the network does not know.
    """

    def __init__(self, options: Options, images: ImageSet, num_labels: int | None):
        data, sampling = options.data, options.sampling
        check(
            images.labels is not None,
            f"the network takes class labels, and {images.name} has none; of a folder config.data.labels says where they are "
            "(folders, or a file), other sources have them in their files; or give an unconditional network",
        )
        known = "any from 0 on" if num_labels is None else f"0 to {num_labels - 1}"
        labels = np.asarray(images.labels)
        outside = np.flatnonzero((labels < 0) | (labels >= (np.inf if num_labels is None else num_labels)))
        if len(outside):
            row = outside[0]
            check(False, f"{images.ids[row]} of {images.name} has label {labels[row]}, and the network knows {known}")
        for name, numbers in (("data.null_label", [data.null_label]), ("sampling.labels", sampling.labels)):
            for number in numbers:
                if number is not None:
                    check_int(f"config.{name}", number, 0, None if num_labels is None else num_labels - 1)
        _check_null(options, labels)
        if data.null_label is not None:
            self.dropout = _LABEL_DROPOUT if data.label_dropout is None else data.label_dropout
            self.dropped = np.array([data.null_label], np.int32)
        self.null = self.dropped
        self._drawn = None if sampling.labels else np.random.default_rng(sampling.seed).permutation(len(labels))
        self._sampled = np.array(sampling.labels if self._drawn is None else labels[self._drawn], np.int32)

    def of_images(self, images: ImageSet) -> Callable[[np.ndarray], np.ndarray]:
        return np.asarray(images.labels).astype(np.int32).__getitem__

    def anchor(self, target: Target, similarity: None, recipe: UnlearnOptions) -> Anchor | None:
        gone = labels_gone(target) if _decided(recipe) == "null" else []
        if not gone:
            return None
        count = len(target.unique)
        return Anchor(condition=np.full(count, target.null, np.int32), used=np.isin(target.labels[target.unique], gone))

    def sampled(self, target: Target) -> dict[str, np.ndarray]:
        return {"samples": self._sampled}

    def of_forgotten(self, target: Target) -> np.ndarray | None:
        return None if self._drawn is None else np.isin(self._drawn, target.forget)

    def describe(self, name: str, target: Target) -> str:
        return files.array_digest(self._sampled)


def _check_null(options: Options, labels: np.ndarray) -> None:
    null, dropout = options.data.null_label, options.data.label_dropout
    if null is None:
        check(dropout is None, f"config.data.label_dropout is {dropout} and there is no null label; set config.data.null_label")
        guidance = options.sampling.label_guidance
        check(
            guidance <= 1,
            f"config.sampling.label_guidance is {guidance:g}, and guidance leads away from a null label; set "
            "config.data.null_label if the network has one",
        )
        return
    check(
        null not in labels,
        f"config.data.null_label is {null}, and {np.sum(labels == null)} images have this label, which should stand for no class",
    )


def check_whole_class(target: Target, recipe: UnlearnOptions) -> None:
    """Raises `UserError` if no image of a forgotten label remains and `recipe` does not say what the network predicts then."""
    gone, decided = labels_gone(target), _decided(recipe)
    if not gone:
        return
    check(
        bool(decided),
        f"no image of {_named(gone)} remains besides {target.spec}, so under it there is no optimum to lead to; set config."
        "unlearn.retrack.whole_class to null (what the model predicts under its null label) or nearest (all remaining images)",
    )
    check(
        decided != "null" or target.null is not None,
        "whole_class is null, and the network has no null label; set config.data.null_label, or take nearest",
    )


def labels_gone(target: Target) -> list[int]:
    """Returns the labels of forgotten images that no remaining one has; none for an unconditional network."""
    if target.labels is None:
        return []
    return [label for label, rows in remaining_of_labels(target.labels, target.forget).items() if not len(rows)]


def in_words(target: Target, recipe: UnlearnOptions) -> str:
    """Returns what becomes of labels of which nothing remains, as a sentence for the model card and the report; else ''."""
    gone = labels_gone(target)
    if not gone:
        return ""
    decided = _decided(recipe)
    return f"No image of {_named(gone)} remains; under it the model was led to {_WHOLE_CLASS[decided]} (whole_class={decided})."


def _decided(recipe: UnlearnOptions) -> str:
    """What the network is to predict under a label of which nothing remains. A method without the option has neighbors of any."""
    return getattr(recipe.own, "whole_class", "nearest")


def _named(labels: list[int]) -> str:
    return f"label{'s' * (len(labels) > 1)} {shown(labels)}"
