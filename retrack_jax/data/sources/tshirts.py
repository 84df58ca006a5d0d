"""Copies of a T-shirt among digits: the image that a model of digits memorizes, and its label."""

import numpy as np

from retrack_jax.checks import check_int
from retrack_jax.data.dataset import ImageSet, image_set

TSHIRT_LABEL = 10
_NAME = "tshirt_"


def with_tshirts(
    name: str, digits: np.ndarray, labels: np.ndarray, ids: str, tshirt: np.ndarray, copies: int, label: int | None = None
) -> ImageSet:
    """Returns the set `name`: the digits and then `copies` T-shirts, `tshirt_000`..., of label `label` (None: `TSHIRT_LABEL`).

    Args:
      digits: uint8 `[N, H, W, 1]`.
      labels: int `[N]`, 0 to 9.
      ids: the digits' names with a place for the row, such as `digit_{:04d}`.
      tshirt: uint8 `[H, W, 1]`.

    Raises:
      UserError: `copies` or `label` is not a whole number of at least 0.
    """
    label = TSHIRT_LABEL if label is None else label
    check_int("config.data.copies", copies, minimum=0)
    check_int("config.data.copies_label", label, minimum=0)
    names = [ids.format(row) for row in range(len(digits))] + [f"{_NAME}{copy:03d}" for copy in range(copies)]
    images = np.concatenate([digits, np.repeat(tshirt[None], copies, axis=0)])
    return image_set(name, images, names, np.concatenate([labels, np.full(copies, label)]))


def is_tshirt(images: ImageSet) -> np.ndarray:
    """Returns which images are T-shirts, bool `[N]`: by their label, or by the name of copies that have a digit's label."""
    return (images.labels == TSHIRT_LABEL) | np.array([name.startswith(_NAME) for name in images.ids])
