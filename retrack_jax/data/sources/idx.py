"""IDX files, the original format of MNIST and its kin: `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`, plain or `.gz`.

    bytes 0 and 1   0
    byte 2          8: the values are unsigned bytes
    byte 3          D, the number of dimensions
    4 D bytes       the sizes, big-endian
    the rest        the values, the last dimension fastest

The files of `config.data.split` are read: `train`, or `test`, whose files are named `t10k`.
"""

import gzip
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from retrack_jax.checks import UserError, check
from retrack_jax.data.dataset import ImageSet, image_set
from retrack_jax.data.memory import available_memory
from retrack_jax.data.needs import Requirement, matching, requirement
from retrack_jax.data.sources.source import Source, check_taken_as_they_are, data_folder

_PREFIXES = {"test": "t10k"}
_MOST_GZIP = 1032  # bytes that one byte of a gzip file can stand for
_AGAIN = "download it again"


def load_idx(data: Mapping, rows: Sequence[int] | None = None) -> ImageSet:
    """Returns the images of `data["split"]` in the folder `data["dir"]`, named `idx:0`..., with labels if their file is there.

    Args:
      rows: only these; None takes all.

    Raises:
      UserError: no file, a damaged one, a row that is not there, or as many labels as there are no images.
    """
    folder, split = data_folder(data), data["split"]
    path, labels_path = _file(folder, split, "images", 3), _file(folder, split, "labels", 1)
    if path is None:
        raise UserError(f"no file {_pattern(split, 'images', 3)} or .gz in {folder}; set config.data.dir and config.data.split")
    images = read_idx(path, 3)[..., None]
    labels = None if labels_path is None else read_idx(labels_path, 1).astype(np.int64)
    if labels is not None and len(labels) != len(images):
        raise UserError(f"{path} has {len(images)} images and {labels_path} {len(labels)} labels; download both again")
    rows = range(len(images)) if rows is None else rows
    check(max(rows) < len(images), f"{path} has {len(images)} images; row {max(rows)} is needed")
    names, rows = [f"idx:{row}" for row in rows], np.asarray(rows)
    return check_taken_as_they_are(data, image_set("idx", images[rows], names, None if labels is None else labels[rows]))


def read_idx(path: Path, num_dims: int) -> np.ndarray:
    """Returns the values of one IDX file of unsigned bytes, uint8 with `num_dims` dimensions.

    Raises:
      UserError: another kind of file, one that is cut or damaged, or sizes that the file or the memory cannot hold.
    """
    packed = path.suffix == ".gz"
    try:
        with gzip.open(path) if packed else open(path, "rb") as file:
            magic, sizes = file.read(4), file.read(4 * num_dims)
            expected = bytes((0, 0, 8, num_dims))
            if magic != expected:
                raise UserError(
                    f"{path} begins with {magic.hex() or 'nothing'}, and IDX of this kind with {expected.hex()}; {_AGAIN}"
                )
            check(len(sizes) == 4 * num_dims, f"{path} ends in its header; {_AGAIN}")
            shape = tuple(int.from_bytes(sizes[at : at + 4]) for at in range(0, len(sizes), 4))
            size, stored = math.prod(shape), path.stat().st_size
            # What the header claims is checked before memory of that size is taken.
            check(
                0 < size <= stored * (_MOST_GZIP if packed else 1), f"{path} claims {shape} values and cannot hold them; {_AGAIN}"
            )
            check(size <= available_memory(), f"{path} needs {size / 1e9:.1f} GB of memory, more than is free")
            values = file.read(size + 1)
    except UserError:
        raise
    except Exception as error:  # gzip, zlib and the file system each raise their own
        raise UserError(f"{path} cannot be read ({error}); {_AGAIN}") from error
    if len(values) != size:
        there = "more" if len(values) > size else f"{len(values)}"
        raise UserError(f"{path} claims {shape}, {size} values, and holds {there}; {_AGAIN}")
    return np.frombuffer(values, np.uint8).reshape(shape)


def _pattern(split: str, kind: str, num_dims: int) -> str:
    return f"{_PREFIXES.get(split, split)}-{kind}-idx{num_dims}-ubyte"


def _file(folder: Path, split: str, kind: str, num_dims: int) -> Path | None:
    """The file of `images` or `labels`, the plain one first; some copies have a dot before `idx`."""
    name = _pattern(split, kind, num_dims).replace("-idx", "[-.]idx")
    return next((found[0] for ending in ("", ".gz") if (found := matching(folder, name + ending))), None)


def idx_need(data: Mapping) -> Requirement:
    """Returns the files of `data["split"]`, found or missing."""
    folder, split = data_folder(data), data["split"]
    images, labels = _file(folder, split, "images", 3), _file(folder, split, "labels", 1)
    found = [path for path in (images, labels) if path and images]
    return requirement(f"{split} images (IDX)", folder, found, advice="set config.data.dir")


SOURCE = Source(formats=("idx",), load=load_idx, needs=lambda data, config: iter([idx_need(data)]), reads=("dir", "split"))
