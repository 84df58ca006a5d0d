"""How far two models are apart, as distributions and as functions: an unlearned model u and a retrained one r.

With L the mean denoising loss of an image over noises that both models share:

    (1)  J       =  E_{x ~ u}[L_r(x) - L_u(x)]  +  E_{x ~ r}[L_u(x) - L_r(x)]
    (2)  d(t)^2  =  E_{x, eps}[ ||eps_u(x_t, t) - eps_r(x_t, t)||^2 ],  t in one part of the schedule

The loss is a weighted bound on -log p, so J is a weighted form of the two-sided Kullback-Leibler divergence: 0 for equal models,
and large if either draws what the other finds hard. (2) compares predictions at noisy points of given images. Two models that
were retrained from different seeds are apart too; what counts is how much farther the unlearned model is.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from retrack_jax import parallel
from retrack_jax.checks import check_int
from retrack_jax.metrics.blocks import in_blocks, mapped
from retrack_jax.metrics.membership import denoising_losses, noisy_pairs
from retrack_jax.notation import Array, ModelEpsFn, PyTree, Rng


class Gap(NamedTuple):
    """A difference and its standard error over images."""

    value: float
    error: float


def two_sided_gap(
    eps_fn: ModelEpsFn, params: PyTree, other: PyTree, schedule, samples, other_samples, rng: Rng, *, num_noises: int = 64
) -> Gap:
    """Returns J (1), in squared units summed over pixels, of two unconditional models.

    Args:
      eps_fn: of both; params, other: theirs.
      schedule: of both.
      samples, other_samples: images `[N, H, W, C]` in [-1, 1] that each model drew.
      rng: decides the noises.
      num_noises: draws per image.
    """
    differences = []
    for images, theirs, own in ((samples, other, params), (other_samples, params, other)):
        losses = [denoising_losses(eps_fn, one, schedule, images, rng, num_noises=num_noises) for one in (theirs, own)]
        differences.append((losses[0] - losses[1]).mean(axis=1))
    error = np.sqrt(sum(one.var(ddof=1) / len(one) for one in differences))
    return Gap(float(sum(one.mean() for one in differences)), float(error))


def prediction_distances(
    eps_fn: ModelEpsFn, params: PyTree, other: PyTree, schedule, images, rng: Rng, *, num_noises: int = 64, parts: int = 8
) -> np.ndarray:
    """Returns d^2 (2) for each of `parts` equal parts of the schedule, float64 `[parts]`, summed over pixels.

    The arguments are as in `two_sided_gap`; `images` `[N, H, W, C]` are any that are not forgotten, or the forgotten ones.
    `parts` must divide `num_noises`.
    """
    check_int("num_noises", num_noises, parts)
    images = parallel.replicate(np.asarray(images, np.float32))
    p_distances = mapped(_pair_distances, (None, None, None, None, None, 0), eps_fn=eps_fn, num_noises=num_noises)

    def of_pairs(pairs: np.ndarray) -> Array:
        return p_distances(params, other, schedule, images, rng, pairs)

    distances = in_blocks(of_pairs, len(images) * num_noises, images.shape[1:]).astype(np.float64)
    return distances.reshape(len(images), parts, -1).mean(axis=(0, 2))


def _pair_distances(params, other, schedule, images_NHWC, rng, pairs_B, *, eps_fn, num_noises):
    x_t, t_B, _, _ = noisy_pairs(schedule, images_NHWC, None, jnp.arange(len(images_NHWC)), rng, pairs_B, num_noises)
    return ((eps_fn(params, x_t, t_B) - eps_fn(other, x_t, t_B)) ** 2).sum(axis=(1, 2, 3))
