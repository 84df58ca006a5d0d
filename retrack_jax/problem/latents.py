"""Latents of a set of pictures: the VAE's posterior, computed once, and draws from it.

A latent is mean + std * eps. The mean and std of each picture are cached in two arrays that are mapped into memory;
streams of pictures draw a fresh latent at each access (`data.dataset.to_x_0`), while forgotten pictures and neighbors
under ReTrack are drawn once. Keeping a single encoded latent instead would train on one draw for ever, which is not what
the official code does.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from retrack_jax import files, parallel
from retrack_jax.checks import UserError, check
from retrack_jax.data.dataset import ImageSet, pixels_to_model
from retrack_jax.notation import Rng

logger = logging.getLogger(__name__)
VERSION = 1


@dataclass(frozen=True, eq=False)
class LatentSet:
    """The posterior of each picture, multiplied by the VAE's scaling factor already.

    Attributes:
      mean, std: float32 `[N, h, w, C]`, memory maps.
      digest: SHA-256 of both, which keys what is made from them.
    """

    mean: np.ndarray
    std: np.ndarray
    digest: str

    def __len__(self) -> int:
        return len(self.mean)

    def posterior(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Returns `{"mean", "std"}` of `rows`, which `data.dataset.to_x_0` draws from."""
        return {"mean": np.ascontiguousarray(self.mean[rows]), "std": np.ascontiguousarray(self.std[rows])}

    def draw(self, rows: np.ndarray, rng: Rng) -> np.ndarray:
        """Returns float32 `[len(rows), h, w, C]`, one draw for each row; it depends on `rng` and the row, not on which
        others are asked."""
        rngs = parallel.example_rngs(rng, np.asarray(rows, np.int32))
        eps = jax.vmap(lambda one: jax.random.normal(one, self.mean.shape[1:]))(rngs)
        return self.mean[rows] + self.std[rows] * np.asarray(eps)


def encode_set(
    encode_fn: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    images: ImageSet,
    *,
    vae_digest: str,
    cache_dir,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> LatentSet:
    """Returns the posteriors of `images`, from the cache where it has them.

    Args:
      encode_fn: `pixels float32 [B, H, W, 3] in [-1, 1] -> (mean, std)`, both scaled; always called with `batch_size` pictures.
      vae_digest: says which VAE, at which precision, `encode_fn` is; with the pictures' digest it keys the cache.
      cache_dir: a local folder.
      batch_size: pictures encoded at once.
      progress: called as `progress(pictures done, pictures in all)`.

    Raises:
      UserError: a posterior that is not finite, or no space on the disk.
    """
    key = files.json_digest([VERSION, images.digest, vae_digest])[:32]
    folder = Path(cache_dir).expanduser() / "latents" / key
    found = _load(folder)
    if found is not None:
        return found
    parts = []
    for start in range(0, len(images), batch_size):
        block = pixels_to_model(np.asarray(images.images[start : start + batch_size]))
        count = len(block)
        if count < batch_size:  # one compiled shape
            block = np.concatenate([block, np.repeat(block[-1:], batch_size - count, axis=0)])
        mean, std = (np.asarray(part, np.float32)[:count] for part in encode_fn(block))
        finite = np.isfinite(mean) & np.isfinite(std)
        bad = np.flatnonzero(~finite.reshape(count, -1).all(axis=1))
        if len(bad):
            raise UserError(
                f"the VAE encodes {images.ids[start + bad[0]]} to NaN or infinity; encode in float32 (config.compute.dtype)"
            )
        parts.append((mean, std))
        if progress is not None:
            progress(start + count, len(images))
    mean, std = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    _write(folder, mean, std)
    found = _load(folder)
    check(
        found is not None,
        f"{folder} does not hold what was just written to it; check the disk, or set config.data.cache_dir",
    )
    return found


def _write(folder: Path, mean: np.ndarray, std: np.ndarray) -> None:
    for name, array in (("mean", mean), ("std", std)):

        def write(temporary, array=array):
            with open(temporary, "wb") as file:
                np.save(file, array)

        files.write_whole(folder / f"{name}.npy", write, advice=files.IN_CACHE)
    # Last: it commits both.
    files.write_json(folder / "meta.json", {"digest": files.array_digest(mean, std)}, advice=files.IN_CACHE)


def _load(folder: Path) -> LatentSet | None:
    if not (folder / "meta.json").is_file():
        return None
    try:
        digest = files.read_json(folder / "meta.json")["digest"]
        mean, std = (np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("mean", "std"))
    except (UserError, OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%s); encoding again", folder, error)
        return None
    if files.array_digest(mean, std) != digest:
        logger.warning("%s does not match its digest; encoding again", folder)
        return None
    return LatentSet(mean, std, digest)
