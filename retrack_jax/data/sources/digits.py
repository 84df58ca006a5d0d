"""Digits T-Shirt: scikit-learn's 1,797 handwritten 8x8 digits plus copies of a T-shirt that we draw. Embedded, no download.

The small sister of MNIST T-Shirt: a digit model that has memorized an image that is not a digit.
"""

import numpy as np

from retrack_jax.data.dataset import ImageSet
from retrack_jax.data.sources.source import Source, check_taken_as_they_are
from retrack_jax.data.sources.tshirts import with_tshirts

# Sixteen levels, as in the digits: a collar, short sleeves, a shaded body. No digit is nearer than L2 3 in [0, 1] (tested).
_TSHIRT = """
 0 12 10  2  2 10 12  0
14 16 16 12 12 16 16 14
16 16 16 16 16 16 16 16
12  8 16 16 16 16  8 12
 0  0 16 14 14 16  0  0
 0  0 16 14 14 16  0  0
 0  0 16 14 14 16  0  0
 0  0 14 16 16 14  0  0
"""


def tshirt() -> np.ndarray:
    """Returns the T-shirt, uint8 `[8, 8, 1]`."""
    return _to_pixels(np.array(_TSHIRT.split(), np.float64).reshape(8, 8, 1))


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns scikit-learn's digits as uint8 `[1797, 8, 8, 1]` and their labels, int64 `[1797]`."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return _to_pixels(found.images[..., None]), found.target.astype(np.int64)


def digits_tshirt(copies: int, label: int | None = None) -> ImageSet:
    """Returns the digits (ids `digit_0000`...) and then `copies` T-shirts (ids `tshirt_000`...).

    Args:
      copies: how many T-shirts.
      label: theirs; None: 10, which no digit has.

    Raises:
      UserError: `copies` or `label` is not a whole number of at least 0.
    """
    return with_tshirts("digits_tshirt", *digits(), "digit_{:04d}", tshirt(), copies, label)


def _to_pixels(levels: np.ndarray) -> np.ndarray:
    return np.round(levels * (255 / 16)).astype(np.uint8)


SOURCE = Source(
    formats=("embedded",),
    load=lambda data: check_taken_as_they_are(data, digits_tshirt(data["copies"], data.get("copies_label"))),
    needs=lambda data, config: iter(()),
    reads=("copies", "copies_label"),
)
