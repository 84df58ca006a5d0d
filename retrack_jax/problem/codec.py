"""Between pixels and the space that the network denoises: examples for training, and neighbors in that space.

An example is a dict that `data.dataset.to_x_0` turns into x_0: `pixels`, or the `mean` and `std` of a latent's posterior, which
is drawn from at each access.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax.checks import check
from retrack_jax.config.options import DataOptions
from retrack_jax.data.dataset import ImageSet, pixels_to_model
from retrack_jax.data.distinct import distinct_neighbors
from retrack_jax.models.vae import Autoencoder
from retrack_jax.neighbors.cache import cached_nearest_of_targets
from retrack_jax.neighbors.captions import CaptionedNeighbors
from retrack_jax.neighbors.search import nearest
from retrack_jax.notation import PyTree
from retrack_jax.problem.latents import LatentSet, encode_set
from retrack_jax.problem.target import ForgetData, Target, neighbor_pools

Gather = Callable[[np.ndarray], dict[str, np.ndarray]]


class PixelCodec:
    """Images are denoised as pixels, scaled to [-1, 1]; neighbors are kept in `cache_dir` between runs."""

    digests: dict[str, str] = {}
    decode = None  # what is denoised are the images
    denoised = "images"

    def __init__(self, cache_dir):
        self._cache_dir = cache_dir

    def shape(self, images: ImageSet) -> tuple[int, int, int]:
        """Returns the shape (h, w, C) of what is denoised."""
        return images.images.shape[1:]

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
        rows, distances, null_rows = _of_pools(target, found)
        distinct, own, null = _bank(rows, null_rows)
        return ForgetData(forget, {"pixels": np.ascontiguousarray(images.images[distinct])}, own, rows, distances, null)


def _of_pools(target: Target, found: list) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Returns rows and distances `[F, K]` of what was found in `neighbor_pools(target)`, and the rows under the null label."""
    pools, null_rows = neighbor_pools(target), None if target.null is None else found[-1][0]
    found = found if null_rows is None else found[:-1]
    order = np.argsort(np.concatenate([mine for mine, _ in pools[: len(found)]]))
    rows, distances = (np.concatenate(arrays)[order] for arrays in zip(*found, strict=True))
    return rows, distances, null_rows


def _bank(rows: np.ndarray, null_rows: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Returns the distinct neighbors, and which of them each entry of `rows` and of `null_rows` is."""
    distinct, positions = distinct_neighbors(rows if null_rows is None else np.concatenate([rows, null_rows]))
    return distinct, positions[: len(rows)], None if null_rows is None else positions[len(rows) :]


class LatentCodec:
    """Images are denoised as latents of a VAE.

    Streams draw a latent afresh at each access, from a posterior that is encoded once and cached. The forgotten latents and their
    neighbors, which ReTrack compares, are drawn once, from a fixed key.

    Args:
      vae, params: the network.
      digest: says which VAE it is, at which precision; it keys the cached posteriors.
      options: batch size of the encoder, key of the one draw, and where posteriors are kept.
    """

    denoised = "latents"

    def __init__(self, vae: Autoencoder, params: PyTree, digest: str, options: DataOptions):
        self.vae, self.params, self.digest, self._options = vae, params, digest, options
        self.digests = {"VAE in config.checkpoint": digest}
        self._encode = jax.jit(lambda params, x: vae.apply({"params": params}, x, method="encode"))
        self._decode = jax.jit(lambda params, z: jax.lax.map(lambda one: decode_fn(vae)(params, one[None])[0], z))
        self._latents: dict[str, LatentSet] = {}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """The shape (h, w, C) of the latent of an image of `config.data.resolution`."""
        side = self._options.resolution // self.vae.downscale
        return side, side, self.vae.latent_width

    def shape(self, images: ImageSet) -> tuple[int, int, int]:
        """Returns the shape (h, w, C) of the latents of `images`. Raises `UserError` for images that the VAE does not take."""
        (height, width, channels), factor, takes = images.images.shape[1:], self.vae.downscale, self.vae.in_channels
        wrong = f"the images of {images.name} have {channels} channels, the VAE takes {takes}; set config.data.channels={takes}"
        check(channels == takes, wrong)
        wrong = f"the images of {images.name} are {height}x{width}; the VAE needs sides that {factor} divides"
        check(height % factor == 0 and width % factor == 0, f"{wrong}; set config.data.resolution")
        return height // factor, width // factor, self.vae.latent_width

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Returns images `[N, H, W, C]`, about in [-1, 1], from latents `[N, h, w, c]`."""
        return np.asarray(self._decode(self.params, jnp.asarray(latents)))

    def gather(self, images: ImageSet, rows: np.ndarray) -> Gather:
        """Returns `positions [b] -> {"mean", "std"}` within `rows`; if latents are certain, `{"x_0"}`."""
        latents = self._latents_of(images)
        return lambda positions: latents.posterior(rows[positions])

    def clean(self, images: ImageSet, rows: np.ndarray) -> np.ndarray:
        """Returns the means of the posteriors of `rows`, float32 `[len(rows), h, w, c]`."""
        return np.ascontiguousarray(self._latents_of(images).mean[rows])

    def prepare(self, targets: Sequence[Target], num_neighbors: int, backend: str) -> None:
        """Nothing: neighbors among latents are searched for each target."""

    def forget_data(
        self, target: Target, num_neighbors: int, backend: str, search: Callable[..., CaptionedNeighbors] | None = None
    ) -> ForgetData:
        """Returns the posteriors of the forgotten latents, or with `num_neighbors` > 0 one draw of each and of its neighbors.

        `search` finds them; None searches by latents, and by labels as `PixelCodec` does.
        """
        latents = self._latents_of(target.images)
        if not num_neighbors:
            return ForgetData(latents.posterior(target.unique))
        rng = jax.random.key(self._options.latent_seed)
        forget_x_0, remain_x_0 = latents.draw(target.unique, rng), latents.draw(target.remain, rng)
        null_rows, more = None, {}
        if search is None:

            def among(mine: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
                left_out = np.flatnonzero(np.isin(target.remain, others))
                rows, distances = nearest(forget_x_0[mine], remain_x_0, num_neighbors, backend, exclude=left_out)
                return target.remain[rows], distances

            rows, distances, null_rows = _of_pools(target, [among(*pool) for pool in neighbor_pools(target)])
        else:
            found = search(forget_x_0, remain_x_0, num_neighbors, backend)
            more = {"similarity": found.similarity, "neighbor_bias": found.bias}
            rows, distances = target.remain[found.rows], found.distances
        distinct, own, null = _bank(rows, null_rows)
        bank = {"x_0": remain_x_0[np.searchsorted(target.remain, distinct)]}
        return ForgetData({"x_0": forget_x_0}, bank, own, rows, distances, null, **more)

    def _latents_of(self, images: ImageSet) -> LatentSet:
        if images.digest not in self._latents:
            self._latents[images.digest] = encode_set(
                lambda x: self._encode(self.params, x),
                images,
                vae_digest=self.digest,
                cache_dir=self._options.cache_dir,
                batch_size=self._options.encode_batch_size,
            )
        return self._latents[images.digest]


def decode_fn(vae: Autoencoder) -> Callable:
    """Returns `(params, latents [B, h, w, c]) -> images [B, H, W, C]`."""
    return lambda params, latents: vae.apply({"params": params}, latents, method="decode")


def check_resolution(codec: LatentCodec, resolution: int, smallest: int, where) -> None:
    """Raises `UserError` unless images of `resolution` pixels a side fit the VAE, and latents a multiple of `smallest`."""
    factor = codec.vae.downscale * smallest
    wrong = f"config.data.resolution is {resolution}; the VAE and the network of {where} need a multiple of {factor}"
    check(resolution > 0 and resolution % factor == 0, wrong)
