"""What a source of data is: how it is loaded, which files it needs, and everything else that depends on which source it is."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from retrack_jax.checks import UserError
from retrack_jax.data.dataset import ImageSet
from retrack_jax.data.decode import DecodeOptions
from retrack_jax.data.needs import Requirement


@dataclass(frozen=True, kw_only=True)
class Source:
    """One value of `config.data.source`. `complete_fields` says what `data` is.

    Attributes:
      formats: how its files may be stored, the default first.
      load: `data` -> `ImageSet`, or `name -> Concept` if `gives_concepts`.
      needs: (`data`, whole config as a plain dict) -> the files that are read, each with the command that gets it.
      captions: (`data`, the loaded images) -> the caption of each; None if the source has none.
      checkpoint_command: folder -> the shell command that downloads the checkpoint of this source's config into it; empty where
        no checkpoint is published.
      gives_concepts: whether it holds concepts with prompts rather than one set of images.
      reads: which fields it reads of those that not every source does (table.py).
    """

    formats: tuple[str, ...]
    load: Callable[[Mapping], object]
    needs: Callable[[Mapping, Mapping], Iterator[Requirement]]
    captions: Callable[[Mapping, ImageSet], list[str]] | None = None
    checkpoint_command: Callable[[Path], str] = lambda folder: ""
    gives_concepts: bool = False
    reads: tuple[str, ...] = ()


def data_folder(data: Mapping) -> Path:
    """Returns the folder (or file) that `data` names. Raises `UserError` if it names none."""
    if data["dir"]:
        return Path(data["dir"]).expanduser()
    raise UserError(f"config.data.dir is empty; set it to where the {data['format']} data of {data['source']!r} is")


def decode_options(data: Mapping) -> DecodeOptions:
    """Returns how `data` asks images to be decoded. Raises `UserError` for values that do not exist."""
    return DecodeOptions(**{name: data[name] for name in ("resolution", "crop", "channels", "skip_corrupt") if name in data})


def check_taken_as_they_are(data: Mapping, images: ImageSet) -> ImageSet:
    """Returns `images`, which were stored as arrays. Raises `UserError` if `data` asks to convert them or for another size."""
    where, default, side = data["dir"] or data["source"], DecodeOptions(), data.get("resolution", 0)
    if side and images.images.shape[1:3] != (side, side):
        height, width = images.images.shape[1:3]
        raise UserError(
            f"{where} holds images of {width}x{height} and config.data.resolution is {side!r}, but arrays are taken "
            "as they are; convert them before, or set config.data.resolution=0 for a model that takes them"
        )
    for name in ("crop", "channels"):
        if data.get(name, getattr(default, name)) != getattr(default, name):
            raise UserError(
                f"config.data.{name} is {data[name]!r}, but the arrays of {data['source']!r} are taken as they are; "
                f"convert them before, and leave config.data.{name} at {getattr(default, name)!r}"
            )
    return images
