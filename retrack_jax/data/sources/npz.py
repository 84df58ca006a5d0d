"""Arrays on disk: an `.npz` with `images` (and perhaps `labels`, `ids`), or an `.npy`, which is mapped into memory."""

import math
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from retrack_jax.checks import UserError, check
from retrack_jax.data.dataset import ImageSet, image_set
from retrack_jax.data.memory import available_memory
from retrack_jax.data.needs import if_file, requirement
from retrack_jax.data.sources.source import Source, check_taken_as_they_are, data_folder
from retrack_jax.files import npy_header

_USED = ("images", "labels", "ids")


def load_npz(path) -> ImageSet:
    """Returns the images in `path`: uint8 `[N, H, W, C]`, or `[N, H, W]` for grey ones. Without `ids` they are named `0`,
    `1`, ...

    Raises:
      UserError: no such file, a damaged one, no array `images`, or one of another kind or shape.
    """
    path = Path(path).expanduser()
    check(path.is_file(), f"no file {path}; set config.data.dir to the .npz or .npy file")
    try:
        arrays = {"images": np.load(path, mmap_mode="r")} if path.suffix == ".npy" else _arrays(path)
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy each have their own
        raise UserError(f"{path} is not a readable .npz or .npy file ({error})") from error
    images = arrays["images"]
    check(
        images.ndim in (3, 4) and len(images) > 0,
        f"{path}: images have shape {images.shape}; expected [N, H, W, C] with N at least 1",
    )
    check(images.dtype == np.uint8, f"{path}: images are {images.dtype}; expected uint8, 0 to 255")
    images = images[..., None] if images.ndim == 3 else images
    check(images.shape[3] in (1, 3), f"{path}: images have shape {images.shape}; expected 1 or 3 channels, last")
    labels = arrays.get("labels")
    names = arrays.get("ids", np.arange(len(images))).reshape(-1)
    ids = [str(name) for name in (np.char.decode(names, errors="replace") if names.dtype.kind == "S" else names)]
    for key, values in (("labels", labels), ("ids", ids)):
        if values is not None and np.shape(values)[:1] != (len(images),):
            raise UserError(f"{path}: {len(images)} images but {np.size(values)} {key}")
    if labels is not None:
        whole = np.issubdtype(labels.dtype, np.integer) and labels.ndim == 1
        check(whole, f"{path}: labels are {labels.dtype} {labels.shape}; expected integers [N]")
        labels = labels.astype(np.int64)
    return image_set("npz", images, ids, labels)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of an .npz that are used, once their headers say that they fit the memory."""
    with np.load(path) as archive:
        names = {"images": "arr_0"} if archive.files == ["arr_0"] else {name: name for name in _USED if name in archive.files}
        check("images" in names, f"{path} has no array named images; it has {', '.join(archive.files) or 'none'}")
        _check_sizes(path, archive.zip, names.values())
        return {name: archive[stored] for name, stored in names.items()}


def _check_sizes(path: Path, archive: zipfile.ZipFile, names: Iterable[str]) -> None:
    """Raises `UserError` if the arrays together do not fit the memory, or one claims another size than its file has."""
    needed = 0
    for name in names:
        member = archive.getinfo(f"{name}.npy" if f"{name}.npy" in archive.namelist() else name)
        with archive.open(member) as file:
            shape, _, dtype = npy_header(file)
            size, stored = math.prod(shape) * dtype.itemsize, member.file_size - file.tell()
        check(
            dtype.hasobject or size == stored,  # NumPy itself refuses objects
            f"{path}: the array {name} claims {size / 1e9:.3g} GB and holds {stored / 1e9:.3g}; it is damaged, save it again",
        )
        needed += size
    free = available_memory()
    check(
        needed <= free,
        f"{path}: its arrays need {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free; save the images as .npy, "
        "which is mapped into memory, or as files",
    )


def _needs(data: Mapping, config: Mapping):
    path = data_folder(data)
    yield requirement("images", path, if_file(path), advice="set config.data.dir")


SOURCE = Source(
    formats=("npz",), load=lambda data: check_taken_as_they_are(data, load_npz(data_folder(data))), needs=_needs, reads=("dir",)
)
