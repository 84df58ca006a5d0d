"""Images decoded once into a file of raw uint8 pixels that training, neighbors and metrics map into memory.

Two files a set: `KEY.pixels`, then `KEY.json` (shape, names, labels, sizes, the pixels' SHA-256), which is written last and so
commits both. The key covers what the pixels depend on: the source files (name, size, time of change), the decoding rules and
Pillow's version. A set under its key is trusted: gigabytes are not hashed at every start. One that is not whole is decoded again.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from retrack_jax import files
from retrack_jax.checks import UserError, check, shown
from retrack_jax.data.dataset import ImageSet, check_distinct
from retrack_jax.data.decode import VERSION, CorruptImage, DecodeOptions, decode_many
from retrack_jax.log import progress

logger = logging.getLogger(__name__)


def decoded_images(
    name: str,
    encoded: Callable[[], Iterable[tuple[str, object]]],
    count: int,
    options: DecodeOptions,
    *,
    cache_dir,
    source_key: object,
    labels: Callable[[], Sequence[int]] | None = None,
) -> ImageSet:
    """Returns the decoded images of a source, from the cache if it has them.

    Args:
      encoded: yields (id, bytes or path) of each of `count` images; raises `UserError` for what it cannot read. Called only if
        images must be decoded.
      cache_dir: a local folder; an address such as `gs://` is refused.
      source_key: JSON value that changes whenever the source's content does.
      labels: returns the label of each image, in the same order. Called only if images must be decoded.

    Raises:
      UserError: corrupt images (unless `options.skip_corrupt`), images of several shapes, duplicate names, no space on the disk.
    """
    import PIL

    check(
        "://" not in str(cache_dir),
        f"config.data.cache_dir is {cache_dir}; set it to a local folder: decoded images are mapped into memory",
    )
    key = [VERSION, PIL.__version__, asdict(options), source_key]
    meta_path = Path(files.cache_path(cache_dir, "images", key, "json"))
    with _alone(meta_path):
        images = files.read_cached(meta_path, partial(_load, name))
        if images is None:
            _decode_to_file(name, encoded, count, options, meta_path, labels)
            images = _load(name, meta_path)
    return images


@contextmanager
def _alone(path: Path):
    """Waits for another process that decodes the same set."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_suffix(".lock"), "w")
    except OSError as error:
        raise UserError(f"cannot write to {path.parent} ({error.strerror}); {files.IN_CACHE}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # some network disks have no locks; what lies there may be another process's
            logger.warning("%s cannot be locked (%s); other commands may decode the same images", path.parent, error.strerror)
        yield


def _load(name: str, meta_path: Path) -> ImageSet:
    """Returns the set. Raises `ValueError`, `KeyError` or `OSError` if it is not whole."""
    meta = json.loads(meta_path.read_text())
    pixels_path, shape = meta_path.with_suffix(".pixels"), tuple(meta["shape"])
    if pixels_path.stat().st_size != np.prod(shape):
        raise ValueError(f"{pixels_path.name} is not of shape {shape}")
    for image_id, reason in meta["skipped"]:
        logger.warning("%s: left out corrupt image %s (%s)", name, image_id, reason)
    labels = None if meta["labels"] is None else np.array(meta["labels"], np.int64)
    pixels, sizes = np.memmap(pixels_path, np.uint8, "r", shape=shape), np.array(meta["sizes"], np.int32)
    return ImageSet(pixels, tuple(meta["ids"]), labels, meta["digest"], name, sizes=sizes)


def _decode_to_file(name, encoded, count, options, meta_path, labels) -> None:
    pixels_path = meta_path.with_suffix(".pixels")
    ids, decoded_rows, skipped, sizes, shape = [], [], [], [], None

    def write(temporary):
        nonlocal shape
        with open(temporary, "wb") as file:
            decoded = decode_many(encoded(), options)
            for row, (image_id, image) in enumerate(progress(decoded, f"decode {name}", total=count, unit="image")):
                if isinstance(image, CorruptImage):
                    skipped.append((image_id, str(image)))
                    continue
                if shape is None:
                    shape = image.pixels.shape
                    _check_space(pixels_path, count * image.pixels.nbytes)
                ids.append(image_id)
                decoded_rows.append(row)
                sizes.append(image.size)
                file.write(np.ascontiguousarray(image.pixels).data)
            _check_decoded(name, ids, skipped, options)

    meta_path.unlink(missing_ok=True)  # until the new pixels are whole, nothing may claim the old ones
    files.write_whole(pixels_path, write, advice=files.IN_CACHE)
    meta = {
        "name": name,
        "shape": [len(ids), *shape],
        "digest": pixels_digest(pixels_path, (len(ids), *shape)),
        "ids": ids,
        "labels": None if labels is None else [int(label) for label in np.asarray(labels())[decoded_rows]],
        "skipped": skipped,
        "sizes": sizes,
    }
    files.write_json(meta_path, meta, advice=files.IN_CACHE)


def _check_decoded(name, ids, skipped, options) -> None:
    if skipped and not options.skip_corrupt:
        named = shown([f"{image_id} ({reason})" for image_id, reason in skipped], most=3)
        raise UserError(
            f"{name}: {len(skipped)} of {len(ids) + len(skipped)} images cannot be decoded: {named}; "
            "repair or remove them, or set config.data.skip_corrupt=True to leave them out"
        )
    if not ids:
        raise UserError(f"{name}: no image could be decoded")
    check_distinct(name, ids)


def _check_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(
            f"decoded images need {needed / 1e9:.1f} GB in {path.parent}, where {free / 1e9:.1f} GB are free; "
            "set config.data.cache_dir"
        )


def pixels_digest(path: Path, shape: tuple[int, ...]) -> str:
    """Returns `files.array_digest` of a file of raw uint8 pixels. It is read, not mapped: mapped pages count as memory."""
    start = f"{np.dtype(np.uint8).str}{shape}".encode()
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, lambda: hashlib.sha256(start)).hexdigest()


def file_key(path: Path, name: str | None = None) -> list:
    """Returns [name, size, time of change] of a file, by which a change of its content is noticed."""
    status = os.stat(path)
    return [name or path.name, status.st_size, status.st_mtime_ns]
