"""A folder of images, subfolders too. An image's id is its path below the folder, such as `10001.jpg`."""

import dataclasses
import errno
import logging
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import numpy as np

from retrack_jax import files
from retrack_jax.checks import UserError, shown
from retrack_jax.data.cache import decoded_images, file_key
from retrack_jax.data.dataset import ImageSet
from retrack_jax.data.labels import is_listed, labels_of_files
from retrack_jax.data.needs import Requirement, requirement
from retrack_jax.data.sources.captions import captions_need, folder_captions
from retrack_jax.data.sources.source import Source, data_folder, decode_options
from retrack_jax.weights.hub import is_id
from retrack_jax.weights.kinds import takes_prompts

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
logger = logging.getLogger(__name__)


def list_images(folder: Path, skip_broken: bool = False) -> tuple[list[str], Counter]:
    """Returns the images below `folder` by their paths relative to it, sorted, and how many files of each other kind there are;
    hidden files and folders are left out.

    Links to folders are followed, each folder once: under a second name a copy of a forgotten image would remain.

    Args:
      skip_broken: leave out, rather than refuse, links whose target does not exist.

    Raises:
      UserError: no such folder, no image in it, one below it that cannot be read, or broken links among the images.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; set config.data.dir to the folder that holds the images")
    names, broken, others, seen = [], [], Counter(), set()
    for root, folders, files_here in os.walk(folder, followlinks=True, onerror=_refuse):
        if (real := os.path.realpath(root)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(filter(is_listed, folders))
        for name in files_here:
            path = Path(root, name)
            if name.startswith("."):
                continue
            if path.suffix.lower() in SUFFIXES:
                (names if _is_file(path) else broken).append(path.relative_to(folder).as_posix())
                continue
            if path.is_symlink():  # one into a folder that may not be entered comes among the files, and could hold images
                _is_file(path)
            others[path.suffix.lower() or "none"] += 1
    if broken and not skip_broken:
        named = shown([_with_target(folder / name) for name in sorted(broken)], most=3)
        raise UserError(
            f"{len(broken)} of {len(names) + len(broken)} images in {folder} are no files: {named}; restore or remove them, or "
            "set config.data.skip_corrupt=True to leave them out"
        )
    if not names:
        kinds = f"; it has {_described(others)}" if others else ""
        raise UserError(f"no image in {folder} (looked for {' '.join(SUFFIXES)}, in subfolders too){kinds}; set config.data.dir")
    return sorted(names), others


def _is_file(path: Path) -> bool:
    """Whether there is a file. Raises `UserError` if the system does not say."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself
            return False
        return _refuse(error)


def _refuse(error: OSError) -> NoReturn:
    raise UserError(
        f"cannot read {error.filename} ({error.strerror}); its images would be left out: make it readable, or move it"
    ) from error


def _with_target(path: Path) -> str:
    return f"{path} (a link to {os.readlink(path)}, which does not exist)" if path.is_symlink() else str(path)


def _described(kinds: Counter) -> str:
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(kinds.items()))


def named_images(data: Mapping) -> ImageSet:
    """Returns the names of the images below `data["dir"]` as a set without pixels (zeros `[N, 1, 1, 1]`): targets resolve in it
    before anything is decoded. Raises as `list_images` does.
    """
    folder = data_folder(data)
    names, _ = list_images(folder, data.get("skip_corrupt", False))
    nothing, labels = np.broadcast_to(np.uint8(0), (len(names), 1, 1, 1)), labels_of_files(names, data, folder)
    return ImageSet(images=nothing, ids=tuple(names), labels=labels, digest="", name=data["source"], folder=folder)


def load_folder(data: Mapping) -> ImageSet:
    """Returns the images below `data["dir"]`, sorted by name, decoded once into the cache; with labels if `data["labels"]` says
    where they come from. Raises as `list_images`, `decoded_images` and `labels_of_files` do.
    """
    folder, options = data_folder(data), decode_options(data)
    names, others = list_images(folder, options.skip_corrupt)
    if others:
        logger.info("%s: %d files of other kinds are left out (%s)", folder, others.total(), _described(others))
    key = files.json_digest([file_key(folder / image, image) for image in names])
    images = decoded_images(
        data["source"],
        lambda: ((image, folder / image) for image in names),
        len(names),
        options,
        cache_dir=data["cache_dir"],
        source_key=["folder", key],
    )
    return dataclasses.replace(images, folder=folder, labels=labels_of_files(images.ids, data, folder))


def folder_need(data: Mapping, command: str = "") -> Requirement:
    """Returns the images below `data["dir"]`, found or missing; `command` gets them."""
    folder = data_folder(data)
    try:
        found, advice = [folder / name for name in list_images(folder, data.get("skip_corrupt", False))[0]], ""
    except UserError as error:
        found, advice = [], str(error)
    return requirement("images", folder, found, command=command, advice=advice)


def _needs(data: Mapping, config: Mapping) -> Iterator[Requirement]:
    images = folder_need(data)
    yield images
    checkpoint = config.get("checkpoint", "")
    if images.found and not is_id(checkpoint) and takes_prompts(checkpoint):  # nothing is downloaded for the list
        yield captions_need(data, named_images(data))


SOURCE = Source(formats=("folder",), load=load_folder, needs=_needs, captions=folder_captions, reads=("dir", "labels"))
