"""Was an image in the training set? Scores, their AUC, and the spread of models that never saw it.

Equations:
    (1)  loss score    -mean over (t, eps) of ||eps_pred(x_t, t) - eps||^2                           higher: more likely a member
                       (of a flow, of the velocity: ||u_pred(x_t, t) - (eps - x_0)||^2)
    (2)  SecMI score   -||psi(phi(x_t)) - x_t||^2 at t = t_sec                                          (Duan et al. 2023)
    (2a) phi, one DDIM step up:      x_{t+k} = gamma_{t+k} x_0' + sigma_{t+k} e
                                     e       = eps_pred(x_t, t)
                                     x_0'    = (x_t - sigma_t e) / gamma_t
    (2b) psi, one DDIM step down:    x_t'    = gamma_t x_0'' + sigma_t e'
                                     e'      = eps_pred(x_{t+k}, t + k)
                                     x_0''   = (x_{t+k} - sigma_{t+k} e') / gamma_{t+k}
    (2c) x_t itself comes from the image by the steps phi from t = 0; of a flow phi and psi are steps of Euler's method
    (3)  AUC = P(score of a member > score of a held-out image) + P(equal)/2

An AUC means something only if members and held-out images are exchangeable: two random parts of one data set. For an outlier such
as the T-shirt, even a model that never saw it has an AUC of 0.0. There, the loss on it is compared with the spread of models that
were retrained without it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax import parallel
from retrack_jax.checks import Diverged, check, check_int
from retrack_jax.diffusion.conversions import add_noise, eps_to_x0, expand
from retrack_jax.metrics.blocks import condition_of, in_blocks, mapped
from retrack_jax.notation import Array, ModelEpsFn, PyTree, Rng

T_SEC, INTERVAL = 100, 10  # of equation 2: the paper's for CIFAR-10


class Auc(NamedTuple):
    """An AUC in [0, 1] and its bootstrap interval."""

    value: float
    low: float
    high: float


def denoising_losses(
    eps_fn: ModelEpsFn,
    params: PyTree,
    schedule,
    images,
    rng: Rng,
    *,
    num_noises: int = 256,
    conditions: PyTree = None,
    numbers: np.ndarray | None = None,
    batch_size: int | None = None,
    desc: str = "",
) -> np.ndarray:
    """Returns ||eps_pred - eps||^2, a sum over pixels, of each image under `num_noises` draws: float64 `[N, num_noises]`.

    The draws depend only on `rng`, the number of the image and the number of the draw, so two models get the same ones. Draw j
    takes t from the j-th of `num_noises` equal parts of [0, T): every image sees all parts of the schedule.

    Args:
      eps_fn: pass the same function object to reuse what is compiled.
      params, schedule: of the model.
      images: `[N, H, W, C]` in [-1, 1].
      rng: decides t and eps.
      num_noises: draws per image.
      conditions: of the images, as in `metrics.blocks.condition_of`.
      numbers: int `[N]`, the number of each image; None: 0, ..., N - 1.
      batch_size, desc: as in `in_blocks`, for pairs of image and draw.

    Raises:
      Diverged: a loss that is not finite.
    """
    check_int("num_noises", num_noises, 1)
    images = parallel.replicate(np.asarray(images, np.float32))
    conditions = parallel.replicate(jax.tree.map(np.asarray, conditions))
    numbers = parallel.replicate(np.arange(len(images), dtype=np.int32) if numbers is None else np.asarray(numbers, np.int32))
    p_losses = mapped(_pair_losses, (None, None, None, None, None, None, 0), eps_fn=eps_fn, num_noises=num_noises)

    def of_pairs(pairs: np.ndarray) -> Array:
        return p_losses(params, schedule, images, conditions, numbers, rng, pairs)

    losses = in_blocks(of_pairs, len(images) * num_noises, images.shape[1:], batch_size, desc).astype(np.float64)
    _check_finite("loss", losses)
    return losses.reshape(len(images), num_noises)


def _pair_losses(params, schedule, images_NHWC, conditions, numbers_N, rng, pairs_B, *, eps_fn, num_noises):
    x_t, t_B, target, condition = noisy_pairs(schedule, images_NHWC, conditions, numbers_N, rng, pairs_B, num_noises)
    return jnp.sum((eps_fn(params, x_t, t_B, *condition) - target) ** 2, axis=(1, 2, 3))


def noisy_pairs(schedule, images_NHWC: Array, conditions: PyTree, numbers_N: Array, rng: Rng, pairs_B: Array, num_noises: int):
    """Returns (x_t, t, target of the network, condition) of the pairs `image * num_noises + draw`, int `[B]`.

    They are those of `denoising_losses` for images with these numbers.
    """
    image_B, draw_B = pairs_B // num_noises, pairs_B % num_noises
    x_0 = images_NHWC[image_B]

    def draw(number, j):
        time_rng, noise_rng = jax.random.split(jax.random.fold_in(jax.random.fold_in(rng, number), j))
        return jax.random.uniform(time_rng), jax.random.normal(noise_rng, images_NHWC.shape[1:])

    place_B, eps = jax.vmap(draw)(numbers_N[image_B], draw_B)
    num_timesteps = len(schedule.gamma)
    t_B = jnp.floor((draw_B.astype(jnp.float32) + place_B) * (num_timesteps / num_noises)).astype(jnp.int32)
    t_B = jnp.minimum(t_B, num_timesteps - 1)
    x_t = add_noise(x_0, eps, schedule.gamma[t_B], schedule.sigma[t_B])
    return x_t, t_B, schedule.target(x_0, eps), condition_of(conditions, image_B)


def loss_scores(eps_fn: ModelEpsFn, params: PyTree, schedule, images, rng: Rng, *, num_noises: int = 64, **options) -> np.ndarray:
    """Returns the loss score of each image (equation 1), float64 `[N]`; arguments as in `denoising_losses`."""
    losses = denoising_losses(eps_fn, params, schedule, images, rng, num_noises=num_noises, **options)
    return -losses.mean(axis=1)


def secmi_scores(
    eps_fn: ModelEpsFn,
    params: PyTree,
    schedule,
    images,
    *,
    t_sec: int = T_SEC,
    interval: int = INTERVAL,
    conditions: PyTree = None,
    batch_size: int | None = None,
    desc: str = "",
) -> np.ndarray:
    """Returns the SecMI-style score of each image (equation 2), float64 `[N]`; deterministic.

    `t_sec` is the timestep of the error, a multiple of `interval`, which is k of equation 2. The other arguments are as in
    `denoising_losses`. Raises `UserError` for timesteps outside the schedule, `Diverged` for a score that is not finite.
    """
    num_timesteps = len(schedule.gamma)
    check_int("interval", interval, 1)
    check_int("t_sec", t_sec, 0, num_timesteps - 1 - interval)
    check(t_sec % interval == 0, f"t_sec is {t_sec}; it must be a multiple of interval, {interval}")
    images = np.asarray(images, np.float32)
    p_t_error = mapped(_t_error, (None, None, None, 0, 0), eps_fn=eps_fn, t_sec=t_sec, interval=interval)

    def of_rows(rows: np.ndarray) -> Array:
        return p_t_error(params, schedule, conditions, images[rows], rows)

    errors = in_blocks(of_rows, len(images), images.shape[1:], batch_size, desc).astype(np.float64)
    _check_finite("SecMI score", errors)
    return -errors


def _t_error(params, schedule, conditions, x_0, row_B, *, eps_fn, t_sec, interval):
    condition = condition_of(conditions, row_B)

    def ddim(x, start, end):
        start_B, end_B = (jnp.full((len(x),), t, jnp.int32) for t in (start, end))
        eps = eps_fn(params, x, start_B, *condition)
        if schedule.is_flow:
            return x + expand(schedule.sigma[end_B] - schedule.sigma[start_B], x) * eps
        clean = eps_to_x0(eps, x, schedule.gamma[start_B], schedule.sigma[start_B])
        return add_noise(clean, eps, schedule.gamma[end_B], schedule.sigma[end_B])

    x_t = jax.lax.fori_loop(0, t_sec // interval, lambda i, x: ddim(x, i * interval, (i + 1) * interval), x_0)
    back = ddim(ddim(x_t, t_sec, t_sec + interval), t_sec + interval, t_sec)
    return jnp.sum((back - x_t) ** 2, axis=(1, 2, 3))


def auc(members, held_out) -> float:
    """Returns the AUC of two sets of scores (equation 3), in [0, 1]; 0.5 tells nothing apart."""
    from scipy.stats import mannwhitneyu

    check(min(len(members), len(held_out)) > 0, f"an AUC needs images on both sides, found {len(members)} and {len(held_out)}")
    wins = mannwhitneyu(members, held_out, method="asymptotic").statistic  # pairs that the member wins; a tie counts half
    return float(wins / (len(members) * len(held_out)))


def membership_auc(members, held_out, *, seed: int, num_bootstrap: int = 1000) -> Auc:
    """Returns the AUC of scores of forgotten (once trained-on) images `[N]` against held-out ones `[M]`, and its interval.

    The interval holds 95% of `num_bootstrap` AUCs of both sets drawn again with replacement; `seed` decides
    these draws. The held-out images must be exchangeable with the others, and no model may have seen them.
    """
    members, held_out = np.asarray(members, np.float64), np.asarray(held_out, np.float64)
    _check_finite("membership score", np.concatenate([members, held_out]))
    value = auc(members, held_out)
    order = np.random.default_rng(seed)
    draws = [auc(order.choice(members, len(members)), order.choice(held_out, len(held_out))) for _ in range(num_bootstrap)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return Auc(value, float(low), float(high))


def prediction_interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the interval in which one more run would lie, with 95% confidence and Student's t of n - 1 degrees of freedom:

        mean +- t sqrt(1 + 1/n) std

    A model counts as having forgotten if its value, such as the mean loss on the forgotten images, lies inside the interval of
    models that were retrained with other seeds.

    Raises:
      UserError: fewer than two values.
    """
    from scipy.stats import t as student

    values = np.asarray(values, np.float64)
    check(len(values) >= 2, f"the spread of retrain seeds needs at least 2 of them, found {len(values)}")
    width = student.ppf(0.975, len(values) - 1) * np.sqrt(1 + 1 / len(values)) * values.std(ddof=1)
    return float(values.mean() - width), float(values.mean() + width)


def _check_finite(name: str, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        count = int((~np.isfinite(values)).sum())
        raise Diverged(f"{count} of {values.size} values of the {name} are not finite; the model has diverged")
