"""All sources of data by name. To add one, write a module that ends in its record and add that here."""

from collections.abc import Mapping

from retrack_jax.checks import check, check_choice
from retrack_jax.data.sources import celebahq, cifar10, concepts, digits, folder, idx, mnist5k, mnist_tshirt, npz, parquet, tfds
from retrack_jax.data.sources.source import Source

SOURCES: dict[str, Source] = {
    "digits_tshirt": digits.SOURCE,
    "mnist_tshirt": mnist_tshirt.SOURCE,
    "mnist5k_tshirt": mnist5k.SOURCE,
    "cifar10": cifar10.SOURCE,
    "celebahq": celebahq.SOURCE,
    "folder": folder.SOURCE,
    "parquet": parquet.SOURCE,
    "idx": idx.SOURCE,
    "npz": npz.SOURCE,
    "tfds": tfds.SOURCE,
    "concepts": concepts.SOURCE,
}
_DEFAULTS = {
    "dir": "", "format": "", "copies": 0, "cache_dir": "~/.cache/retrack_jax", "split": "train", "tfds_name": "",
    "caption_column": "text",
}  # fmt: skip
_OF_SOME = {
    "dir": "",
    "copies": 0,
    "copies_label": None,
    "labels": "",
    "split": "train",
    "tfds_name": "",
}  # fields that not every source reads
_NOT_OF_FORMAT = {"folder": ("split",), "tfds": ("labels",)}  # of these, by what its files are, whatever the source


def complete_fields(data: Mapping) -> dict:
    """Returns `data`, the fields of `config.data`, with defaults for absent ones and `format` resolved to a format of the source.

    Raises:
      UserError: an unknown source, a format that it does not have, or a field that it does not read.
    """
    data = _DEFAULTS | dict(data)
    check_choice("config.data.source", data["source"], SOURCES)
    for name, unset in _OF_SOME.items():
        readers, value = [other for other, source in SOURCES.items() if name in source.reads], data.get(name, unset)
        check(
            value == unset or data["source"] in readers,
            f"config.data.{name} is {value!r}, which {data['source']!r} does not read, but {' or '.join(readers)}; "
            f"leave it at {unset!r}",
        )
    formats = SOURCES[data["source"]].formats
    if data["format"]:
        check_choice("config.data.format", data["format"], formats)
    chosen = data["format"] or formats[0]
    for name in _NOT_OF_FORMAT.get(chosen, ()):
        value, unset = data.get(name, _OF_SOME[name]), _OF_SOME[name]
        check(value == unset, f"config.data.{name} is {value!r}, which format {chosen!r} does not read; leave it at {unset!r}")
    return data | {"format": chosen}
