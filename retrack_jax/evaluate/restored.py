"""What a model restores of a forgotten image: the probe behind SSCD, and the pictures of it that the report shows."""

from collections.abc import Callable

import jax
import numpy as np

from retrack_jax import parallel
from retrack_jax.data.dataset import pixels_to_model, unit_to_pixels
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.files import write_npz
from retrack_jax.metrics.blocks import shown_progress
from retrack_jax.sampling.inject import inject, noised
from retrack_jax.types import PyTree, Rng

T = 250  # how far the image is noised before it is restored (the official protocol)
MOST_KEPT = 8  # images of a group whose pictures are kept; SSCD is of all


def restore(
    eps_fn: Callable, params: PyTree, schedule: Schedule, images: np.ndarray, rng: Rng
) -> tuple[np.ndarray, np.ndarray]:
    """Returns each image noised to t = 250, and what the model makes of that: two float32 `[F, H, W, C]` in [0, 1].

    Args:
      eps_fn: `eps_fn(params, x_t, t) -> eps`.
      images: the forgotten images, uint8 `[F, H, W, C]`; each is restored by itself.
      rng: every model is given the same noise.
    """

    @jax.jit
    def one(params, x_0, rng):
        x_0, rngs = x_0[None], rng[None]
        x_t = noised(x_0, rngs, schedule, t=T)
        return x_t[0], inject(lambda x, t: eps_fn(params, x, t), x_0, rngs, schedule, t=T)[0]

    rngs = jax.random.split(rng, len(images))
    pairs = []
    with shown_progress("sscd", len(images)) as bar:
        for x_0, rng in zip(pixels_to_model(images), rngs, strict=True):
            pairs.append(jax.device_get(one(params, x_0, rng)))
            bar.update()
    given, made = (np.clip(np.stack([pair[place] for pair in pairs]) / 2 + 0.5, 0.0, 1.0) for place in (0, 1))
    return given, made


def keep_pictures(path, forgotten: np.ndarray, given: np.ndarray, made: np.ndarray, scores: np.ndarray) -> None:
    """Writes the first images to the `.npz` at `path`, as uint8 `[F, H, W, C]` by floor(255 x), with their SSCD `[F]`."""
    few = slice(MOST_KEPT)
    pixels = {"noised": given, "restored": made}
    arrays = {name: unit_to_pixels(images[few]) for name, images in pixels.items()}
    parallel.on_main(lambda: write_npz(path, forgotten=forgotten[few], sscd=np.asarray(scores)[few], **arrays))
