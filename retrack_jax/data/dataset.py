"""What every source of images returns, and the conversions between pixels and what networks see.

Images stay uint8, in memory or in a memory map; only a batch at a time becomes float. A float32 round trip through [-1, 1] with
floor loses one level on 63 of 256 values, so metrics take real images from the uint8 array and never through the model's space.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax.checks import UserError
from retrack_jax.files import array_digest, json_digest


class RowView:
    """Some rows of an array, read when they are sliced, so that a selection of a memory map is never copied whole. A slice may
    go on into the rows, `view[3:5, 0]`.

    Attributes:
      source: the array, `[N, ...]`.
      dtype, ndim, shape: of the rows, `[R, ...]`.
    """

    def __init__(self, source: np.ndarray, rows: np.ndarray, *, flat: bool = False):
        self.source, self._rows, self._flat = source, rows, flat
        tail = source.shape[1:]
        self.dtype, self.shape = source.dtype, (len(rows), int(np.prod(tail))) if flat else (len(rows), *tail)
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index) -> np.ndarray:
        index, *within = index if isinstance(index, tuple) else (index,)
        rows = self._rows[index]
        values = self.source[(rows, *within)]
        return values.reshape(*np.shape(rows), -1) if self._flat else values

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def as_vectors(self) -> "RowView":
        """Returns the same rows, each as one vector: `[R, D]`."""
        return RowView(self.source, self._rows, flat=True)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Named uint8 images.

    Attributes:
      images: uint8 `[N, H, W, C]`, an array, a memory map, or some rows of one.
      ids: N stable names, without duplicates, such as `hf:10000` or `10001.jpg`.
      labels: int `[N]`, or None if the source has none.
      digest: SHA-256 of the pixels, the key of every cache that depends on them.
      name: what the source is called in reports.
      other_name: a name -> the name of the same image in the source's other numbering, or None if it has none.
      folder: where the files are that `ids` name; None if images are not files.
      captions: N texts, or None if no network here takes any.
      sizes: int32 `[N, 2]`, height and width of each image before it was scaled, or None if images are not files.
    """

    images: np.ndarray | RowView
    ids: Sequence[str]
    labels: np.ndarray | None
    digest: str
    name: str
    other_name: Callable[[str], str | None] | None = None
    folder: Path | None = None
    captions: Sequence[str] | None = None
    sizes: np.ndarray | None = None

    def __post_init__(self):
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            raise UserError(f"{self.name}: images are {self.images.dtype} {self.images.shape}; expected uint8 [N, H, W, C]")
        if len(self.ids) != len(self.images):
            raise UserError(f"{self.name}: {len(self.images)} images and {len(self.ids)} names; give each image one")
        check_distinct(self.name, self.ids)

    def __len__(self) -> int:
        return len(self.images)


def check_distinct(name: str, ids: Sequence[str]) -> None:
    """Raises `UserError`, naming the first that comes twice, unless all `ids` of the set `name` differ."""
    seen: set[str] = set()
    twice = next((image_id for image_id in ids if image_id in seen or seen.add(image_id)), None)
    if twice is not None:
        raise UserError(
            f"{name}: two images are named {twice!r}; names say what to forget, so they must be distinct: rename one of the two"
        )


def image_set(name: str, images: np.ndarray, ids: Sequence[str], labels: np.ndarray | None = None) -> ImageSet:
    """Returns an `ImageSet` with its digest computed from the pixels."""
    return ImageSet(images=images, ids=tuple(ids), labels=labels, digest=array_digest(images), name=name)


def part(images: ImageSet, rows: np.ndarray, which: str, *, in_memory: bool = False) -> ImageSet:
    """Returns the images of `rows`, int `[R]`, as a set named "NAME, `which`".

    Rows of a memory map are read when they are used, unless `in_memory`: nearly all of CelebA-HQ would take 5.9 GB. The digest is
    then that of the whole set's digest and the rows.
    """
    name, ids = f"{images.name}, {which}", [images.ids[row] for row in rows]
    labels = None if images.labels is None else np.asarray(images.labels)[rows]
    if isinstance(images.images, np.memmap | RowView) and not in_memory:
        pixels, digest = RowView(images.images, rows), json_digest([images.digest, array_digest(rows)])
    else:
        pixels = images.images[rows]
        digest = array_digest(pixels)
    captions = None if images.captions is None else [images.captions[row] for row in rows]
    sizes = None if images.sizes is None else images.sizes[rows]
    return replace(images, images=pixels, ids=tuple(ids), labels=labels, digest=digest, name=name, captions=captions, sizes=sizes)


def pixels_to_model(pixels):
    """uint8 pixels -> float32 in [-1, 1]. NumPy in, NumPy out; JAX in, JAX out."""
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1.0)


def unit_to_pixels(unit) -> np.ndarray:
    """Floats in [0, 1] -> uint8 by floor(255 x), as the official code and torchmetrics do."""
    return np.floor(255.0 * np.asarray(unit)).astype(np.uint8)


def to_x_0(data: dict, rngs) -> jnp.ndarray:
    """Returns clean images `[B, H, W, C]` in the network's space from what a stream carries.

    Args:
      data: `pixels` (uint8), or `x_0` (already in the network's space), or `mean` and `std` of a latent posterior, which is drawn
        from afresh at each access.
      rngs: `[B]` keys, used by the posterior alone.
    """
    if "pixels" in data:
        return pixels_to_model(data["pixels"])
    if "x_0" in data:
        return data["x_0"]
    noise = jax.vmap(lambda rng: jax.random.normal(rng, data["mean"].shape[1:]))(rngs)
    return data["mean"] + data["std"] * noise
