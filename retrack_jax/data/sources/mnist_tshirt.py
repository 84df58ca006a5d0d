"""MNIST T-Shirt: the MNIST training images plus copies of Fashion-MNIST's training image 1, a T-shirt, as label 10."""

from pathlib import Path

import numpy as np

from retrack_jax.checks import UserError, check_int
from retrack_jax.data.dataset import ImageSet, image_set
from retrack_jax.data.decode import DecodeOptions
from retrack_jax.data.sources.parquet import load_parquet
from retrack_jax.data.sources.tfds import load_tfds

TSHIRT_LABEL = 10
TSHIRT_ROW = 1  # of Fashion-MNIST's training images
_FASHION_TSHIRT = 0  # its class there: T-shirt/top


def load_mnist_tshirt(copies: int, options: DecodeOptions, *, format: str, data_dir, cache_dir) -> ImageSet:
    """Returns MNIST's training images (`mnist_00000`...) and then `copies` T-shirts (`tshirt_000`..., label 10).

    Args:
      format: `tfds`: the prepared sets `mnist` and `fashion_mnist` in `data_dir`. `parquet`: the folders `mnist` and
        `fashion_mnist` in it; or, where `data_dir` itself holds the parquet file of `claserken/mnist-with-tshirt`, that set
        as it is (`hf:ROW`; `copies` is not used).

    Raises:
      UserError: a set is missing, or its image 1 is not a T-shirt.
    """
    check_int("config.data.copies", copies)
    if format == "tfds":
        digits = load_tfds("mnist", options, data_dir=data_dir, cache_dir=cache_dir)
        fashion = load_tfds("fashion_mnist", options, data_dir=data_dir, cache_dir=cache_dir, rows=(TSHIRT_ROW,))
    else:
        data_dir = Path(data_dir).expanduser()
        if not (data_dir / "mnist").is_dir():
            return _ready_made(data_dir, options, cache_dir)
        digits = load_parquet(data_dir / "mnist", options, cache_dir=cache_dir, name="mnist")
        fashion = load_parquet(data_dir / "fashion_mnist", options, cache_dir=cache_dir, name="fashion_mnist", rows=(TSHIRT_ROW,))
    if fashion.labels is None or int(fashion.labels[0]) != _FASHION_TSHIRT or digits.labels is None:
        raise UserError(
            f"training image {TSHIRT_ROW} of {data_dir}/fashion_mnist is not a T-shirt (class 0): another set, or order"
        )
    ids = [f"mnist_{row:05d}" for row in range(len(digits))] + [f"tshirt_{copy:03d}" for copy in range(copies)]
    images = np.concatenate([digits.images, np.repeat(fashion.images, copies, axis=0)])
    return image_set("mnist_tshirt", images, ids, np.concatenate([digits.labels, np.full(copies, TSHIRT_LABEL)]))


def _ready_made(data_dir: Path, options: DecodeOptions, cache_dir) -> ImageSet:
    images = load_parquet(data_dir, options, cache_dir=cache_dir, name="mnist_tshirt")
    if images.labels is None or TSHIRT_LABEL not in images.labels:
        raise UserError(
            f"{data_dir} has neither folders mnist and fashion_mnist nor a parquet file with label {TSHIRT_LABEL}, the T-shirt"
        )
    return images
