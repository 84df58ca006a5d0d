"""What a model restores of a forgotten image: the probe behind SSCD, and the pictures of it that the report shows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax import parallel
from retrack_jax.data.dataset import unit_to_pixels
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.files import write_npz
from retrack_jax.metrics.blocks import condition_of, in_blocks, mapped
from retrack_jax.notation import Array, ModelEpsFn, PyTree, Rng
from retrack_jax.sampling.inject import inject, noised

INJECTED_T = 250  # how far the image is noised before it is restored, as in the official protocol
MOST_KEPT = 8  # images of a group whose pictures are stored; SSCD is computed for all


def restore(
    eps_fn: ModelEpsFn,
    params: PyTree,
    schedule: Schedule,
    x_0: np.ndarray,
    rng: Rng,
    conditions: PyTree = None,
    decode: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns each image noised to t = 250, and what the model makes of that: two float32 `[F, H, W, C]` in [0, 1].

    Args:
      eps_fn: `eps_fn(params, x_t, t, *condition) -> eps`; pass the same function object to reuse what is compiled.
      x_0: the forgotten images as the network denoises them, `[F, h, w, c]`.
      rng: every model is given the same noise.
      conditions: of the images, as in `metrics.blocks.condition_of`.
      decode: as in `Task`.
    """
    rngs = jax.random.split(rng, len(x_0))
    p_pairs = mapped(_pairs, (None, None, None, 0, 0, 0), eps_fn=eps_fn)

    def of_rows(rows: np.ndarray) -> Array:
        return p_pairs(params, schedule, conditions, x_0[rows], rngs[rows], rows)

    pairs = np.moveaxis(in_blocks(of_rows, len(x_0), x_0.shape[1:], desc="sscd"), 1, 0)
    if decode is not None:
        pairs = np.stack([decode(side) for side in pairs])
    noised_images, restored = np.clip(pairs / 2 + 0.5, 0.0, 1.0)
    return noised_images, restored


def _pairs(
    params: PyTree, schedule: Schedule, conditions: PyTree, x_0: Array, rngs: Rng, rows: Array, *, eps_fn: ModelEpsFn
) -> Array:
    """Maps clean images `[b, H, W, C]` to noised and restored ones, `[b, 2, H, W, C]`."""
    condition = condition_of(conditions, rows)
    made = inject(lambda x, t: eps_fn(params, x, t, *condition), x_0, rngs, schedule, t=INJECTED_T)
    return jnp.stack([noised(x_0, rngs, schedule, t=INJECTED_T), made], axis=1)


def keep_pictures(path, forgotten: np.ndarray, given: np.ndarray, made: np.ndarray, scores: np.ndarray) -> None:
    """Writes the first images to the `.npz` at `path`, as uint8 `[F, H, W, C]` by floor(255 x), with their SSCD `[F]`."""
    few = slice(MOST_KEPT)
    pixels = {"noised": given, "restored": made}
    arrays = {name: unit_to_pixels(images[few]) for name, images in pixels.items()}
    parallel.on_main(lambda: write_npz(path, forgotten=forgotten[few], sscd=np.asarray(scores)[few], **arrays))
