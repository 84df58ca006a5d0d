"""Where images come from, by the name of the source: one door to all of them."""

from pathlib import Path

from retrack_jax.checks import UserError, check_choice
from retrack_jax.data.dataset import ImageSet
from retrack_jax.data.decode import DecodeOptions
from retrack_jax.data.sources.cifar10 import check_order
from retrack_jax.data.sources.digits import digits_tshirt
from retrack_jax.data.sources.folder import load_folder
from retrack_jax.data.sources.mnist_tshirt import load_mnist_tshirt
from retrack_jax.data.sources.npz import load_npz
from retrack_jax.data.sources.parquet import load_parquet
from retrack_jax.data.sources.tfds import default_data_dir, load_tfds

# Source -> the formats that it is read from, the default first.
FORMATS = {
    "digits_tshirt": ("embedded",),
    "mnist_tshirt": ("tfds", "parquet"),
    "cifar10": ("parquet", "tfds"),
    "celebahq": ("folder", "tfds"),
    "folder": ("folder",),
    "parquet": ("parquet",),
    "npz": ("npz",),
    "tfds": ("tfds",),
}
CELEBAHQ_TFDS = "celeb_a_hq/256"


def data_format(source: str, format: str = "") -> str:
    """Returns the format that `source` is read from. Raises `UserError` for an unknown source, or a format that it has not."""
    check_choice("config.data.source", source, FORMATS)
    if format:
        check_choice("config.data.format", format, FORMATS[source])
    return format or FORMATS[source][0]


def data_folder(source: str, format: str, folder: str) -> Path:
    """Returns the folder (or file) that is read: `folder`, or TFDS's own default. Raises `UserError` where one must be given."""
    if folder:
        return Path(folder).expanduser()
    if format == "tfds":
        return default_data_dir()
    raise UserError(f"config.data.dir is empty; set it to where the {format} data of {source!r} is")


def load_images(data: dict) -> ImageSet:
    """Returns the images that the fields of `config.data` describe.

    Args:
      data: `source`; and, with defaults, `dir`, `format`, `copies`, `resolution`, `crop`, `channels`, `skip_corrupt`,
        `cache_dir`, `split`, `tfds_name`, as configs/base.py explains them.

    Raises:
      UserError: anything that the user can mend: an unknown source, missing or damaged files, images that do not agree.
    """
    data = {"dir": "", "format": "", "copies": 0, "cache_dir": "~/.cache/retrack_jax", "split": "train", "tfds_name": "", **data}
    source, split, cache_dir = data["source"], data["split"], data["cache_dir"]
    format = data_format(source, data["format"])
    if source == "digits_tshirt":
        return digits_tshirt(data["copies"])
    if format == "npz":
        _check_as_they_are(data)
        return load_npz(data_folder(source, format, data["dir"]))
    folder = data_folder(source, format, data["dir"])
    options = DecodeOptions(**{name: data[name] for name in ("resolution", "crop", "channels", "skip_corrupt") if name in data})
    if source == "mnist_tshirt":
        return load_mnist_tshirt(data["copies"], options, format=format, data_dir=folder, cache_dir=cache_dir)
    if format == "folder":
        return load_folder(folder, options, cache_dir=cache_dir, name=source)
    if format == "tfds":
        name = {"cifar10": "cifar10", "celebahq": CELEBAHQ_TFDS}.get(source, data["tfds_name"])
        if not name:
            raise UserError("config.data.tfds_name is empty; set it to a prepared TFDS data set, such as mnist")
        images = load_tfds(name, options, data_dir=folder, cache_dir=cache_dir, split=split)
    else:
        images = load_parquet(folder, options, cache_dir=cache_dir, name=source, split=split)
    return check_order(images) if source == "cifar10" else images


def _check_as_they_are(data: dict) -> None:
    """Refuses the fields that ask for a conversion of arrays, which are taken as they are."""
    default = DecodeOptions()
    for name in ("resolution", "crop", "channels"):
        if data.get(name, getattr(default, name)) != getattr(default, name):
            raise UserError(
                f"config.data.{name} is {data[name]!r}, but the arrays of an npz are taken as they are; "
                f"convert them before, and leave config.data.{name} at {getattr(default, name)!r}"
            )
