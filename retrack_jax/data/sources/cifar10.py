"""CIFAR-10's two orders, and the check that what was loaded is in one of them.

The official code counts rows of the Hugging Face parquet, whose order follows the archive: batches 4, 3, 2, 5, 1 of 10,000
images each. TFDS counts through the batches 1 to 5. So `hf:10000` is `data_batch_3[0]`, and `tfds:train_20000`.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from retrack_jax.checks import UserError
from retrack_jax.data.commands import unzip
from retrack_jax.data.dataset import ImageSet
from retrack_jax.data.needs import Requirement
from retrack_jax.data.sources.parquet import load_parquet, parquet_need
from retrack_jax.data.sources.source import Source
from retrack_jax.data.sources.tfds import load_tfds, tfds_need

ARCHIVE_BATCHES = (4, 3, 2, 5, 1)
BATCH = 10_000
SIZE = 50_000
OFFICIAL_ROWS = range(10_000, 10_010)
OFFICIAL_LABELS = (8, 5, 0, 6, 9, 2, 8, 3, 6, 2)


def other_name(name: str) -> str | None:
    """Returns `tfds:train_20000` for `hf:10000` and the other way round; None for what is neither."""
    order, _, number = name.partition(":")
    number = number.removeprefix("train_") if order == "tfds" else number
    if not number.isdigit() or int(number) >= SIZE:
        return None
    batch, row = divmod(int(number), BATCH)
    if order == "hf":
        return f"tfds:train_{(ARCHIVE_BATCHES[batch] - 1) * BATCH + row:05d}"
    if order == "tfds":
        return f"hf:{ARCHIVE_BATCHES.index(batch + 1) * BATCH + row}"
    return None


def check_order(images: ImageSet) -> ImageSet:
    """Returns `images` if the ten official targets, as far as they are there, have CIFAR-10's labels.

    Raises:
      UserError: they do not, so this is another set or another order, and targets would name the wrong images.
    """
    rows = {name: row for row, name in enumerate(images.ids)}
    for number, label in zip(OFFICIAL_ROWS, OFFICIAL_LABELS, strict=True):
        name = f"hf:{number}"
        row = rows.get(name, rows.get(other_name(name)))
        if row is None:
            continue
        found = None if images.labels is None else int(np.asarray(images.labels)[row])
        if found != label:
            raise UserError(
                f"image {name} of {images.name} has label {found}, and in CIFAR-10 it is {label}: this is another data set "
                "or another order, and targets would name the wrong images; download it again "
                "(config.mode=check gives the command)"
            )
    return images


def _load(data: Mapping) -> ImageSet:
    images = load_tfds("cifar10", data) if data["format"] == "tfds" else load_parquet(data)
    return dataclasses.replace(check_order(images), other_name=other_name)


def _needs(data: Mapping, config: Mapping) -> Iterator[Requirement]:
    yield tfds_need("cifar10", data) if data["format"] == "tfds" else parquet_need(data, "uoft-cs/cifar10")


_ARCHIVE = "https://github.com/VainF/Diff-Pruning/releases/download/v0.0.1/ddpm_ema_cifar10.zip"
SOURCE = Source(
    formats=("parquet", "tfds"),
    load=_load,
    needs=_needs,
    reads=("dir", "split"),
    checkpoint_command=lambda folder: unzip(_ARCHIVE, "ddpm_ema_cifar10", folder),
)
