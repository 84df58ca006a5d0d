"""MNIST T-Shirt: the MNIST training images plus copies of Fashion-MNIST's training image 1, a T-shirt, as label 10."""

from collections.abc import Iterator, Mapping

from retrack_jax.checks import UserError, check, check_int
from retrack_jax.data.commands import kaggle_folder
from retrack_jax.data.dataset import ImageSet
from retrack_jax.data.needs import Requirement
from retrack_jax.data.sources.idx import idx_need, load_idx
from retrack_jax.data.sources.parquet import load_parquet, parquet_need
from retrack_jax.data.sources.source import Source, data_folder
from retrack_jax.data.sources.tfds import load_tfds, tfds_need
from retrack_jax.data.sources.tshirts import TSHIRT_LABEL, with_tshirts

TSHIRT_ROW = 1  # of Fashion-MNIST's training images
_FASHION_TSHIRT = 0  # its class there: T-shirt/top
_HUB = {"mnist": "ylecun/mnist", "fashion_mnist": "zalando-datasets/fashion_mnist"}
_READY_MADE = "claserken/mnist-with-tshirt"


def load_mnist_tshirt(data: Mapping) -> ImageSet:
    """Returns MNIST's training images (`mnist_00000`...) and then `data["copies"]` T-shirts (`tshirt_000`..., label 10).

    Format `tfds` reads the prepared sets `mnist` and `fashion_mnist` in `data["dir"]`; `parquet` and `idx` read the folders of
    these names in it. A folder that itself holds the parquet file of `claserken/mnist-with-tshirt` is read as that set (names
    `hf:ROW`; `copies` is not used).

    Raises:
      UserError: a set or its labels are missing, or its image 1 is not a T-shirt.
    """
    copies = data["copies"]
    check_int("config.data.copies", copies)
    if data["format"] == "tfds":
        data = data | {"split": "train"}
        digits, fashion = load_tfds("mnist", data), load_tfds("fashion_mnist", data, rows=(TSHIRT_ROW,))
    elif data["format"] == "parquet" and _is_ready_made(data):
        return _ready_made(data)
    else:
        load = load_idx if data["format"] == "idx" else load_parquet
        digits, fashion = load(_part(data, "mnist")), load(_part(data, "fashion_mnist"), rows=(TSHIRT_ROW,))
    where = f"{data['dir']}/" if data["dir"] else ""
    for name, images in (("mnist", digits), ("fashion_mnist", fashion)):
        check(images.labels is not None, f"{where}{name} has no labels, which the experiment needs; get both of its files")
    if int(fashion.labels[0]) != _FASHION_TSHIRT:
        raise UserError(f"training image {TSHIRT_ROW} of {where}fashion_mnist is not a T-shirt (class 0): another set, or order")
    return with_tshirts(
        "mnist_tshirt", digits.images, digits.labels, "mnist_{:05d}", fashion.images[0], copies, data.get("copies_label")
    )


def _part(data: Mapping, name: str) -> dict:
    """The fields that read the files of one of the two sets."""
    return data | {"source": name, "dir": str(data_folder(data) / name), "split": "train"}


def _is_ready_made(data: Mapping) -> bool:
    return not (data_folder(data) / "mnist").is_dir()


def _ready_made(data: Mapping) -> ImageSet:
    given = data.get("copies_label")
    check(given is None, f"config.data.copies_label is {given!r}, and {data['dir']} has T-shirts with labels; leave it out")
    images = load_parquet(data | {"split": "train"})
    if images.labels is None or TSHIRT_LABEL not in images.labels:
        raise UserError(
            f"{data['dir']} has neither folders mnist and fashion_mnist nor a parquet file with label {TSHIRT_LABEL}, the T-shirt"
        )
    return images


def _needs(data: Mapping, config: Mapping) -> Iterator[Requirement]:
    if data["format"] == "tfds":
        yield from (tfds_need(name, data | {"split": "train"}) for name in _HUB)
    elif data["format"] == "idx":
        yield from (idx_need(_part(data, name)) for name in _HUB)
    elif _is_ready_made(data) and (ready_made := parquet_need(data | {"split": "train"}, _READY_MADE)).found:
        yield ready_made
    else:
        yield from (parquet_need(_part(data, name), repository) for name, repository in _HUB.items())


SOURCE = Source(
    formats=("tfds", "parquet", "idx"),
    load=load_mnist_tshirt,
    needs=_needs,
    reads=("dir", "copies", "copies_label"),
    checkpoint_command=lambda folder: kaggle_folder("checkpoints", "checkpoints/mnist-tshirt/base/checkpoint-117500", folder),
)
