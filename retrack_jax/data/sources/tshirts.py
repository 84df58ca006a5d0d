"""Copies of a T-shirt among digits: the image that a model of digits memorizes, and its label."""

import numpy as np

from retrack_jax.data.dataset import ImageSet, image_set

TSHIRT_LABEL = 10


def with_tshirts(
    name: str, digits: np.ndarray, labels: np.ndarray, ids: str, tshirt: np.ndarray, copies: int, label: int = TSHIRT_LABEL
) -> ImageSet:
    """Returns the set `name`: the digits and then `copies` T-shirts, `tshirt_000`..., of label `label`.

    Args:
      digits: uint8 `[N, H, W, 1]`.
      labels: int `[N]`, 0 to 9.
      ids: the digits' names with a place for the row, such as `digit_{:04d}`.
      tshirt: uint8 `[H, W, 1]`.
    """
    names = [ids.format(row) for row in range(len(digits))] + [f"tshirt_{copy:03d}" for copy in range(copies)]
    images = np.concatenate([digits, np.repeat(tshirt[None], copies, axis=0)])
    return image_set(name, images, names, np.concatenate([labels, np.full(copies, label)]))
