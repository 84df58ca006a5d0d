"""Negative log-likelihood of images, in bits/dim, by the probability-flow ODE (Song et al. 2021, section 4.3).

Equations, for D values per image, time s in [1e-5, 1], beta(s) = 0.1 + 19.9 s, T = 1000:
    (1)  dx/ds = f(x, s) = -beta(s) x / 2 - beta(s) score / 2,      score = -eps_pred / std
    (2)  d log p / ds = -div f,   estimated as  v^T (df/dx) v   with v in {-1, +1}^D            (Hutchinson, Rademacher)
    (3)  log p(x_0) = log N(x_1; 0, I) + integral of div f over s
    (4)  bits/dim = -log p(x_0) / (D ln 2) + 7
    (5)  official:    t = floor(999 s),  std = sigma[t] of the discrete table
         continuous:  t = 1000 s - 1 as a float,  std = sqrt(1 - exp(-0.1 s - 9.95 s^2))
    (6)  of a flow:   dx/ds = u(x, T s), the velocity that the network predicts, in place of (1)
    (7)  of EDM:      dx/ds = h sigma eps_pred,  log(sigma) = log(sigma_min) + h s,  h = log(sigma_max/sigma_min),
                      and log N(x_1; 0, sigma_max^2 I) in (3)

The 7 in (4) is 8 bits per value less 1, because the range of the data, [-1, 1], is two wide. Pixels are not dequantized. The
official code has a continuous beta and a discrete std, so its right-hand side jumps at every t: on Gaussian data its error is
0.0009, 0.008 and 0.084 bits at std 0.5, 0.1 and 0.02. It is the default because published numbers have it. The mode `continuous`
is smooth, and our own: its t is the place at which the discrete table has the same std, so it starts at -0.99, one step before
the first t that the network was trained on. A flow has its own ODE (6), with any shift: s is sigma. EDM has (7), whose end
neglects the variance of the data next to sigma_max^2. Nothing in these two jumps.

x and log p are one state of RK45 (Dormand-Prince), as in the official code. Here each pair of image and probe has its own step
size, so a value does not depend on what else is in the batch. The divergence is computed by `jvp`, which gives the same value as
`vjp` in a third of the time.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax.checks import UserError, check, check_choice, check_int, check_number
from retrack_jax.metrics.blocks import in_blocks, mapped
from retrack_jax.notation import Array, ModelEpsFn, PyTree, Rng

MODES = ("official", "continuous")
_FLOW, _EDM = "flow", "edm"
BETA_MIN, BETA_MAX = 0.1, 20.0
START = 1e-5  # The score diverges at 0; the official code starts here.
OFFSET = 7.0
_MAX_STEPS = 10_000
_FIRST_STEP = 1e-3  # The controller shrinks it if it is too long; a search for a better one would compile the network twice more.


def nll_bits_per_dim(
    eps_fn: ModelEpsFn,
    params: PyTree,
    schedule,
    images,
    rng: Rng,
    *,
    num_probes: int = 1,
    mode: str = "official",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    conditions: Array | None = None,
    batch_size: int | None = None,
    desc: str = "",
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the negative log-likelihood of each image and its standard error over probes, in bits/dim.

    Both are float64 `[B]`; the error is None with a single probe. Compiled once per `eps_fn` and image shape: to use it for other
    `params`, pass the same function object.

    Args:
      eps_fn: deterministic; its t is int32 in the official mode and float32 in the continuous one, for a flow and for EDM.
      params: its parameters.
      schedule: a flow's, EDM's, or the linear one, 1e-4 to 0.02 over T = 1000, because equation 1 is its limit.
      images: `[B, H, W, C]` in [-1, 1].
      rng: decides the probes; image i and probe j take `fold_in(fold_in(rng, i), j)`.
      num_probes: independent probes per image; the result is their mean.
      mode: `official` or `continuous` (equation 5); a flow has equation 6 alone and EDM equation 7.
      rtol, atol: tolerances of the solver.
      conditions: of the images, `[B, ...]`, what the network takes besides the image and its time; None: nothing.
      batch_size, desc: as in `in_blocks`, for pairs of image and probe.

    Raises:
      UserError: an unknown mode, another schedule, a continuous t for a model whose eps needs the table, non-finite images, or an
        ODE that the solver cannot follow.
    """
    check_choice("mode", mode, MODES)
    check_int("num_probes", num_probes, 1)
    check_number("rtol", rtol, 0.0, above=True)
    check_number("atol", atol, 0.0, above=True)
    images = np.asarray(images)
    check(images.ndim == 4, f"images have shape {images.shape}; expected [B, H, W, C]")
    check(bool(np.isfinite(images).all()), "images for the likelihood hold NaN or infinity")
    if schedule.has_betas:
        _check_schedule(schedule, mode)
    else:
        mode = _FLOW if schedule.is_flow else _EDM
    images = images.astype(jnp.result_type(float))
    sigma = jnp.asarray(schedule.sigma, images.dtype)
    options = {"eps_fn": eps_fn, "mode": mode, "rtol": float(rtol), "atol": float(atol)}
    in_axes = (None, None, 0, None, 0, 0) if conditions is None else (None, None, 0, None, 0, 0, 0)
    p_log_likelihoods = mapped(_log_likelihoods, in_axes, **options)

    def log_likelihoods(pairs: np.ndarray) -> Array:
        numbers, probes = pairs // num_probes, pairs % num_probes
        condition = () if conditions is None else (np.asarray(conditions)[numbers],)
        return p_log_likelihoods(params, sigma, images[numbers], rng, numbers, probes, *condition)

    # A solver that resolves 1e-5 cannot follow a network that an accelerator rounds to bfloat16 or TF32.
    with jax.default_matmul_precision("highest"):
        log_p = in_blocks(log_likelihoods, len(images) * num_probes, images.shape[1:], batch_size, desc)
    log_p = log_p.astype(np.float64).reshape(len(images), num_probes)
    if not np.isfinite(log_p).all():
        raise UserError(
            f"the likelihood's ODE has no solution within {_MAX_STEPS} steps (rtol {rtol:g}): the model's noise prediction is "
            "not finite or far from smooth; look at its samples"
        )
    bits = -log_p / (math.log(2.0) * math.prod(images.shape[1:])) + OFFSET
    stderr = bits.std(axis=1, ddof=1) / math.sqrt(num_probes) if num_probes > 1 else None
    return bits.mean(axis=1), stderr


def _log_likelihoods(
    params, sigma_T, images_BHWC, rng, number_B, probe_B, condition_B=None, *, eps_fn, mode, rtol, atol, fixed_step=None
):
    """log p of equation 3 `[B]` for pairs of an image, with its number, and a probe; NaN if the solver did not reach the end.

    With `fixed_step`, all steps have that size; the test of the order of convergence uses it.
    """
    import diffrax

    controller = diffrax.PIDController(rtol=rtol, atol=atol) if fixed_step is None else diffrax.ConstantStepSize()

    @jax.jit  # diffrax traces the field in several places; this traces the network once.
    def vector_field(s, state, probe_and_condition):
        (x, _), (probe, condition) = state, probe_and_condition

        def drift(x):
            if mode == _FLOW:
                return eps_fn(params, x[None], (len(sigma_T) * s)[None], *condition)[0]
            if mode == _EDM:
                h = jnp.log(sigma_T[-1] / sigma_T[0])
                sigma = sigma_T[0] * jnp.exp(h * s)
                return h * sigma * eps_fn(params, x[None], sigma[None], *condition)[0]
            t, std = _label_and_std(s, sigma_T, mode)
            eps = eps_fn(params, x[None], t[None], *condition)[0]
            beta = (BETA_MIN + (BETA_MAX - BETA_MIN) * s).astype(x.dtype)
            return -0.5 * beta * (x - eps / std.astype(x.dtype))

        value, tangent = jax.jvp(drift, (x,), (probe,))
        return value, jnp.sum(tangent * probe)

    def solve(image, number, probe, condition):
        image_rng = jax.random.fold_in(rng, number)
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(vector_field),
            diffrax.Dopri5(),
            t0=START,
            t1=1.0,
            dt0=_FIRST_STEP if fixed_step is None else fixed_step,
            y0=(image, jnp.zeros((), image.dtype)),
            args=(
                jax.random.rademacher(jax.random.fold_in(image_rng, probe), image.shape, image.dtype),
                () if condition is None else (condition[None],),
            ),
            stepsize_controller=controller,
            adjoint=diffrax.ForwardMode(),
            max_steps=_MAX_STEPS,
            throw=False,
        )
        x_1, divergence = solution.ys[0][0], solution.ys[1][0]
        if mode == _EDM:
            x_1, divergence = x_1 / sigma_T[-1], divergence - x_1.size * jnp.log(sigma_T[-1])
        prior = -0.5 * (jnp.sum(x_1**2) + x_1.size * math.log(2.0 * math.pi))
        return jnp.where(solution.result == diffrax.RESULTS.successful, prior + divergence, jnp.nan)

    return jax.vmap(solve)(images_BHWC, number_B, probe_B, condition_B)


def _label_and_std(s: Array, sigma_T: Array, mode: str) -> tuple[Array, Array]:
    """The network's t and the standard deviation of the noise at time s (equation 5)."""
    if mode == "official":
        t = jnp.floor((len(sigma_T) - 1) * s).astype(jnp.int32)
        return t, sigma_T[t]
    t = len(sigma_T) * s - 1.0
    return t, jnp.sqrt(-jnp.expm1(-BETA_MIN * s - 0.5 * (BETA_MAX - BETA_MIN) * s**2))


def _check_schedule(schedule, mode: str) -> None:
    betas = np.linspace(BETA_MIN / 1000, BETA_MAX / 1000, 1000)
    expected = np.sqrt(1.0 - np.cumprod(1.0 - betas))
    sigma = np.asarray(schedule.sigma)
    if sigma.shape != expected.shape or not np.allclose(sigma, expected, rtol=1e-3):
        raise UserError(
            "the likelihood is defined for the linear schedule, beta 1e-4 to 0.02 over 1000 steps; this model has another, "
            "so leave nll_bits_per_dim out"
        )
    check(
        mode == "official" or schedule.prediction_type == "epsilon",
        f"mode is continuous, whose t is no row of the schedule's table; this model predicts {schedule.prediction_type}, which "
        "becomes eps by that table: use the official mode",
    )
