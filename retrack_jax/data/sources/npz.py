"""Arrays on disk: an `.npz` with `images` (and perhaps `labels`, `ids`), or an `.npy`, which is mapped into memory."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from retrack_jax.checks import UserError, check
from retrack_jax.data.dataset import ImageSet, image_set
from retrack_jax.data.decode import DecodeOptions
from retrack_jax.data.needs import if_file, requirement
from retrack_jax.data.sources.source import Source, data_folder


def load_npz(path, name: str = "npz") -> ImageSet:
    """Returns the images in `path`: uint8 `[N, H, W, C]`, or `[N, H, W]` for grey ones. Without `ids` they are named `0`,
    `1`, ...

    Raises:
      UserError: no such file, a damaged one, no array `images`, or one of another kind or shape.
    """
    path = Path(path).expanduser()
    check(path.is_file(), f"no file {path}; set config.data.dir to the .npz or .npy file")
    try:
        if path.suffix == ".npy":
            arrays = {"images": np.load(path, mmap_mode="r")}
        else:
            with np.load(path) as archive:
                arrays = {key: archive[key] for key in archive.files}
    except Exception as error:  # zipfile, zlib and NumPy each have their own
        raise UserError(f"{path} is not a readable .npz or .npy file ({error})") from error
    if list(arrays) == ["arr_0"]:
        arrays = {"images": arrays["arr_0"]}
    check("images" in arrays, f"{path} has no array named images; it has {', '.join(arrays) or 'none'}")
    images = arrays["images"]
    check(
        images.ndim in (3, 4) and len(images) > 0,
        f"{path}: images have shape {images.shape}; expected [N, H, W, C] with N at least 1",
    )
    check(images.dtype == np.uint8, f"{path}: images are {images.dtype}; expected uint8, 0 to 255")
    images = images[..., None] if images.ndim == 3 else images
    check(images.shape[3] in (1, 3), f"{path}: images have shape {images.shape}; expected 1 or 3 channels, last")
    labels = arrays.get("labels")
    ids = [str(value) for value in arrays["ids"].reshape(-1)] if "ids" in arrays else [str(row) for row in range(len(images))]
    for key, values in (("labels", labels), ("ids", ids)):
        if values is not None and np.shape(values)[:1] != (len(images),):
            raise UserError(f"{path}: {len(images)} images but {np.size(values)} {key}")
    if labels is not None:
        whole = np.issubdtype(labels.dtype, np.integer) and labels.ndim == 1
        check(whole, f"{path}: labels are {labels.dtype} {labels.shape}; expected integers [N]")
        labels = labels.astype(np.int64)
    return image_set(name, images, ids, labels)


def _load(data: Mapping) -> ImageSet:
    default = DecodeOptions()
    for name in ("resolution", "crop", "channels"):
        if data.get(name, getattr(default, name)) != getattr(default, name):
            raise UserError(
                f"config.data.{name} is {data[name]!r}, but the arrays of an npz are taken as they are; "
                f"convert them before, and leave config.data.{name} at {getattr(default, name)!r}"
            )
    return load_npz(data_folder(data))


def _needs(data: Mapping, config: Mapping):
    path = data_folder(data)
    yield requirement("images", path, if_file(path), advice="set config.data.dir")


SOURCE = Source(formats=("npz",), load=_load, needs=_needs)
