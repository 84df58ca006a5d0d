"""Between pixels and the space that the network denoises: examples for training, and neighbors in that space.

An example is a dict that `data.dataset.to_x_0` turns into x_0: `pixels`, or the `mean` and `std` of a latent's posterior, which
is drawn from at each access.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from retrack_jax import parallel
from retrack_jax.checks import check
from retrack_jax.config.options import DataOptions
from retrack_jax.data.dataset import ImageSet, pixels_to_model
from retrack_jax.log import progress
from retrack_jax.models.vae import AutoencoderKL
from retrack_jax.neighbors.cache import cached_nearest_of_targets
from retrack_jax.neighbors.captions import CaptionedNeighbors
from retrack_jax.neighbors.copies import warn_of_copies
from retrack_jax.neighbors.distinct import distinct_neighbors
from retrack_jax.neighbors.search import nearest
from retrack_jax.notation import PyTree
from retrack_jax.problem.latents import LatentSet, encode_set
from retrack_jax.problem.target import ForgetData, Target, neighbor_pools

Gather = Callable[[np.ndarray], dict[str, np.ndarray]]


class PixelCodec:
    """Images are denoised as pixels, scaled to [-1, 1].

    Args:
      cache_dir: where neighbors are kept between runs.
    """

    digests: dict[str, str] = {}

    def __init__(self, cache_dir):
        self._cache_dir = cache_dir

    def gather(self, images: ImageSet, rows: np.ndarray) -> Gather:
        """Returns `positions [b] -> {"pixels": uint8 [b, H, W, C]}` within `rows`."""
        return lambda positions: {"pixels": np.ascontiguousarray(images.images[rows[positions]])}

    def clean(self, images: ImageSet, rows: np.ndarray) -> np.ndarray:
        """Returns `rows` of `images` as the network denoises them without noise, float32 `[len(rows), h, w, c]`."""
        return pixels_to_model(np.ascontiguousarray(images.images[rows]))

    def prepare(self, targets: Sequence[Target], num_neighbors: int, backend: str) -> None:
        """Finds the neighbors of all `targets` in one pass over the images; `forget_data` then reads them from the cache."""
        searches = [(target.unique[mine], others) for target in targets for mine, others in neighbor_pools(target)]
        cached_nearest_of_targets(targets[0].images, searches, num_neighbors, cache_dir=self._cache_dir, backend=backend)

    def forget_data(self, target: Target, num_neighbors: int, backend: str, search: None = None) -> ForgetData:
        """Returns the distinct forgotten images and, with `num_neighbors` K > 0, the K nearest remaining images of each.

        With labels, these have the label of the image, and `null_neighbor_rows` any. `search` is for captions, which images in
        pixels do not have.
        """
        images, pools = target.images, neighbor_pools(target)
        forget = {"pixels": np.ascontiguousarray(images.images[target.unique])}
        if not num_neighbors:
            return ForgetData(forget)
        searches = [(target.unique[mine], others) for mine, others in pools]
        found = cached_nearest_of_targets(images, searches, num_neighbors, backend=backend, cache_dir=self._cache_dir)
        null_rows = None if target.null is None else found.pop()[0]
        order = np.argsort(np.concatenate([mine for mine, _ in pools[: len(found)]]))
        rows, distances = (np.concatenate(arrays)[order] for arrays in zip(*found, strict=True))
        warn_of_copies(
            forget["pixels"],
            images.images[rows[:, 0]],
            lambda row: f"{images.ids[target.unique[row]]} and {images.ids[rows[row, 0]]}",
        )
        distinct, positions = distinct_neighbors(rows if null_rows is None else np.concatenate([rows, null_rows]))
        bank, own, null = np.ascontiguousarray(images.images[distinct]), positions[: len(rows)], positions[len(rows) :]
        return ForgetData(forget, {"pixels": bank}, own, rows, distances, None if null_rows is None else null)


class LatentCodec:
    """Images are denoised as latents of a VAE.

    Streams draw a latent afresh at each access, from a posterior that is encoded once and cached. The forgotten latents and their
    neighbors, which ReTrack compares, are drawn once, from a fixed key.

    Args:
      vae, params: the network.
      digest: says which VAE it is, at which precision; it keys the cached posteriors.
      options: batch size of the encoder, key of the one draw, and where posteriors are kept.
    """

    def __init__(self, vae: AutoencoderKL, params: PyTree, digest: str, options: DataOptions):
        self.vae, self.params, self.digest, self._options = vae, params, digest, options
        self.digests = {"VAE in config.checkpoint": digest}
        self._encode = jax.jit(lambda params, x: vae.apply({"params": params}, x, method="encode"))
        self._latents: dict[str, LatentSet] = {}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """The shape of one latent, (h, w, C)."""
        side = self._options.resolution // self.vae.downscale
        return side, side, self.vae.latent_channels

    def gather(self, images: ImageSet, rows: np.ndarray) -> Gather:
        """Returns `positions [b] -> {"mean", "std"}` within `rows`."""
        latents = self._latents_of(images)
        return lambda positions: latents.posterior(rows[positions])

    def clean(self, images: ImageSet, rows: np.ndarray) -> np.ndarray:
        """Returns the means of the posteriors of `rows`, float32 `[len(rows), h, w, c]`."""
        return np.ascontiguousarray(self._latents_of(images).mean[rows])

    def prepare(self, targets: Sequence[Target], num_neighbors: int, backend: str) -> None:
        """Nothing: each target has pictures and neighbors that no other target shares."""

    def forget_data(
        self, target: Target, num_neighbors: int, backend: str, search: Callable[..., CaptionedNeighbors] | None = None
    ) -> ForgetData:
        """Returns the posteriors of the forgotten latents, or with `num_neighbors` > 0 one draw of each and of its neighbors.

        `search` finds them; None searches by latents alone.
        """
        latents = self._latents_of(target.images)
        if not num_neighbors:
            return ForgetData(latents.posterior(target.unique))
        rng = jax.random.key(self._options.latent_seed)
        forget_x_0, remain_x_0 = latents.draw(target.unique, rng), latents.draw(target.remain, rng)
        if search is None:
            (rows, distances), more = nearest(forget_x_0, remain_x_0, num_neighbors, backend), {}
        else:
            found = search(forget_x_0, remain_x_0, num_neighbors, backend)
            rows, distances, more = found.rows, found.distances, {"similarity": found.similarity, "neighbor_bias": found.bias}
        distinct, positions = distinct_neighbors(rows)
        neighbors = {"x_0": remain_x_0[distinct]}
        return ForgetData({"x_0": forget_x_0}, neighbors, positions, target.remain[rows], distances, **more)

    def _latents_of(self, images: ImageSet) -> LatentSet:
        if images.digest not in self._latents:
            with progress([], f"encode {images.name}", total=len(images), is_main=parallel.is_main_process(), unit="img") as bar:
                self._latents[images.digest] = encode_set(
                    lambda x: self._encode(self.params, x),
                    images,
                    vae_digest=self.digest,
                    cache_dir=self._options.cache_dir,
                    batch_size=self._options.encode_batch_size,
                    progress=lambda done, total: bar.update(done - bar.n),
                )
        return self._latents[images.digest]


def check_resolution(codec: LatentCodec, resolution: int, levels: int, where) -> None:
    """Raises `UserError` unless the VAE and a UNet of `levels` levels take images of `resolution` pixels a side."""
    factor = codec.vae.downscale * 2 ** (levels - 1)
    wrong = f"config.data.resolution is {resolution}; the VAE and the UNet of {where} need a multiple of {factor}"
    check(resolution % factor == 0, wrong)
