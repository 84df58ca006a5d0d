"""Latents of a set of pictures: the VAE's posterior, computed once, and draws from it.

A latent is mean + std * eps, or of a VAE without a posterior (models/vqvae.py) the mean itself. The mean and std of each picture
are cached in one file that is mapped into memory. Streams of pictures draw a fresh latent at each access
(`data.dataset.to_x_0`); under ReTrack, forgotten pictures and neighbors are drawn once. A single cached latent would train on the
same draw forever, which is not what the official code does.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from retrack_jax import files, parallel
from retrack_jax.checks import UserError
from retrack_jax.data.dataset import ImageSet, pixels_to_model
from retrack_jax.log import progress
from retrack_jax.notation import Rng

VERSION = 2


@dataclass(frozen=True, eq=False)
class LatentSet:
    """The posterior of each picture, multiplied by the VAE's scaling factor already.

    Attributes:
      mean, std: float32 `[N, h, w, C]`, memory maps. `std` is None if latents are certain.
    """

    mean: np.ndarray
    std: np.ndarray | None

    def posterior(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Returns `{"mean", "std"}` of `rows`, which `data.dataset.to_x_0` draws from; or `{"x_0"}` if they are certain."""
        mean = np.ascontiguousarray(self.mean[rows])
        return {"x_0": mean} if self.std is None else {"mean": mean, "std": np.ascontiguousarray(self.std[rows])}

    def draw(self, rows: np.ndarray, rng: Rng) -> np.ndarray:
        """Returns float32 `[len(rows), h, w, C]`, one draw for each row; it depends on `rng` and the row, not on which
        others are asked."""
        if self.std is None:
            return np.ascontiguousarray(self.mean[rows])
        rngs = parallel.example_rngs(rng, np.asarray(rows, np.int32))
        eps = jax.vmap(lambda one: jax.random.normal(one, self.mean.shape[1:]))(rngs)
        return self.mean[rows] + self.std[rows] * np.asarray(eps)


def encode_set(
    encode_fn: Callable[[np.ndarray], tuple[np.ndarray, ...]],
    images: ImageSet,
    *,
    vae_digest: str,
    cache_dir,
    batch_size: int,
) -> LatentSet:
    """Returns the posteriors of `images`, from the cache if it has them.

    Args:
      encode_fn: `pixels float32 [B, H, W, C] in [-1, 1] -> (mean, std)`, both scaled, or `(mean,)` if latents are certain; always
        called with `batch_size` pictures.
      vae_digest: says which VAE, at which precision, `encode_fn` is; with the pictures' digest it keys the cache.
      cache_dir: a local folder.

    Raises:
      UserError: a posterior that is not finite, or no space on the disk.
    """
    path = files.cache_path(cache_dir, "latents", [VERSION, images.digest, vae_digest], "npy")
    mean, *std = files.cached_array(path, lambda temporary: _encode(encode_fn, images, batch_size, temporary))
    return LatentSet(mean, std[0] if std else None)


def _encode(encode_fn, images: ImageSet, batch_size: int, path) -> None:
    """Writes the posteriors, float32 `[2, N, h, w, C]`: means, then standard deviations; or `[1, N, h, w, C]`."""
    parts = []
    starts, main = range(0, len(images), batch_size), parallel.is_main_process()
    for start in progress(starts, f"encode {images.name}", is_main=main, unit="batch"):
        block = pixels_to_model(np.asarray(images.images[start : start + batch_size]))
        count = len(block)
        if count < batch_size:  # one compiled shape
            block = np.concatenate([block, np.repeat(block[-1:], batch_size - count, axis=0)])
        posterior = np.stack([np.asarray(part, np.float32)[:count] for part in encode_fn(block)])
        bad = np.flatnonzero(~np.isfinite(posterior).all(axis=(0, 2, 3, 4)))
        if len(bad):
            raise UserError(
                f"the VAE encodes {images.ids[start + bad[0]]} to NaN or infinity; encode in float32 (config.compute.dtype)"
            )
        parts.append(posterior)
    with open(path, "wb") as file:
        np.save(file, np.concatenate(parts, axis=1))
