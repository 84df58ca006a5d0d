"""A folder of images: JPEG, PNG, WebP; subfolders too. An image's id is its path below the folder, such as `10001.jpg`."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from retrack_jax import files
from retrack_jax.checks import UserError
from retrack_jax.data.cache import decoded_images, file_key
from retrack_jax.data.dataset import ImageSet
from retrack_jax.data.needs import Requirement, requirement
from retrack_jax.data.sources.source import Source, data_folder, decode_options

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def list_images(folder) -> list[str]:
    """Returns the images below `folder` by their paths relative to it, sorted; hidden files and folders are left out.

    Links to folders are followed, each folder once: a second name of an image would let a copy of a forgotten one remain.

    Raises:
      UserError: no such folder, or no image in it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; set config.data.dir to the folder that holds the images")
    names, seen = [], set()
    for root, folders, found in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(root)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = Path(root).relative_to(folder)
        names += [(relative / name).as_posix() for name in found if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    if not names:
        raise UserError(f"no image in {folder} (looked for {' '.join(SUFFIXES)}, in subfolders too); set config.data.dir")
    return sorted(names)


def named_images(folder, name: str = "folder") -> ImageSet:
    """Returns the names of the images below `folder` as a set without pixels (zeros `[N, 1, 1, 1]`): targets resolve in it
    before anything is decoded. Raises as `list_images` does.
    """
    names = list_images(folder)
    nothing = np.broadcast_to(np.uint8(0), (len(names), 1, 1, 1))
    return ImageSet(images=nothing, ids=tuple(names), labels=None, digest="", name=name)


def load_folder(data: Mapping) -> ImageSet:
    """Returns the images below `data["dir"]`, sorted by name, decoded once into the cache. Raises as `decoded_images` does."""
    folder, options = data_folder(data), decode_options(data)
    names = list_images(folder)
    key = files.json_digest([file_key(folder / image, image) for image in names])
    return decoded_images(
        data["source"],
        lambda: ((image, folder / image) for image in names),
        len(names),
        options,
        cache_dir=data["cache_dir"],
        source_key=["folder", key],
    )


def folder_need(data: Mapping, command: str = "") -> Requirement:
    """Returns the images below `data["dir"]`, found or missing; `command` gets them."""
    folder = data_folder(data)
    try:
        found, advice = [folder / name for name in list_images(folder)], ""
    except UserError as error:
        found, advice = [], str(error)
    return requirement("images", folder, found, command=command, advice=advice)


SOURCE = Source(formats=("folder",), load=load_folder, needs=lambda data, config: iter([folder_need(data)]))
