"""The forward process and the conversions between what networks predict.

    (1) x_t   = gamma x_0 + sigma eps
    (2) x_0   = (x_t - sigma eps) / gamma
    (3) v     = gamma eps - sigma x_0          so   eps = gamma v + sigma x_t
    (4) u     = eps - x_0                      so   eps = x_t + gamma u   if gamma + sigma = 1, as in a flow (flow.py)

Every function takes gamma and sigma as [B], the values of the schedule's tables at each image's t, and any trailing shape.
"""

from collections.abc import Callable

import jax.numpy as jnp

from retrack_jax.checks import check_choice
from retrack_jax.diffusion import edm
from retrack_jax.diffusion.flow import VELOCITY
from retrack_jax.diffusion.schedule import PREDICTION_TYPES, Schedule
from retrack_jax.diffusion.scheduler_config import FLOOR
from retrack_jax.notation import Array, ModelEpsFn


def expand(a_B: Array, like: Array) -> Array:
    """Returns `a_B` [B] as [B, 1, ..., 1] with the rank of `like`, so that the product broadcasts explicitly."""
    return a_B.reshape(a_B.shape + (1,) * (like.ndim - a_B.ndim))


def add_noise(x_0: Array, eps: Array, gamma_B: Array, sigma_B: Array) -> Array:
    """Returns x_t [B, ...]: equation (1)."""
    return expand(gamma_B, x_0) * x_0 + expand(sigma_B, eps) * eps


def eps_to_x0(eps: Array, x_t: Array, gamma_B: Array, sigma_B: Array) -> Array:
    """Returns x_0 [B, ...]: equation (2). Errors in eps grow by sigma/gamma, which is 157 at the end of DDPM's schedule."""
    return (x_t - expand(sigma_B, eps) * eps) / expand(gamma_B, x_t)


def to_eps(output: Array, x_t: Array, gamma_B: Array, sigma_B: Array, prediction_type: str) -> Array:
    """Returns eps [B, ...] from a network's output of any prediction type: equations (2), (3) and (4).

    Args:
      output, x_t: [B, ...].
      gamma_B, sigma_B: [B].
      prediction_type: `epsilon`, `v_prediction`, `sample` or `flow_prediction`, diffusers' names. For `sample`, the conversion
        divides by sigma, which is 0.01 at t = 0.
    """
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    if prediction_type == "epsilon":
        return output
    gamma, sigma = expand(gamma_B, x_t), expand(sigma_B, x_t)
    if prediction_type == "v_prediction":
        return gamma * output + sigma * x_t
    if prediction_type == VELOCITY:
        return x_t + gamma * output
    return (x_t - gamma * output) / sigma


def make_eps_fn(apply_fn: Callable[..., Array], schedule: Schedule, *, with_variance: bool = False) -> ModelEpsFn:
    """Returns `eps_fn(params, x_t, t, *cond, **kwargs)`, which gives eps whatever the network predicts; of a flow, its velocity.

    Losses, samplers and likelihood see only this. A flow's velocity stays as it is because eps holds none of it at pure noise.
    `x_t` is [B, ...], `t` int32 [B], or of a flow float32 T sigma, of EDM float32 sigma; the result has x_t's shape and dtype.
    EDM's network is given x_t and t scaled (edm.py).

    Args:
      apply_fn: a Linen module's `apply`; called as `apply_fn({"params": params}, x_t, t, *cond, **kwargs)`.
      schedule: its `prediction_type` and tables make the conversion.
      with_variance: of a network that makes twice the channels of x_t: whether these follow those of eps, as they are, for the
        samplers that take the variance from them. Otherwise they are left out, so that no loss depends on them.
    """

    def eps_fn(params, x_t, t, *cond, **kwargs):
        if schedule.is_edm:
            c_in, gamma_B, sigma_B = edm.scales(schedule.sigma_at(t).astype(x_t.dtype), schedule.sigma_data)
            seen = expand(c_in, x_t) * x_t
            output = apply_fn({"params": params}, seen, schedule.network_time(t), *cond, **kwargs).astype(x_t.dtype)
            velocity = output if schedule.prediction_type == "v_prediction" else -output
            return to_eps(velocity, seen, gamma_B, sigma_B, "v_prediction")
        output = apply_fn({"params": params}, x_t, schedule.network_time(t), *cond, **kwargs).astype(x_t.dtype)
        if output.shape[-1] != 2 * x_t.shape[-1]:
            return as_eps(output, x_t, t)
        prediction, variance = jnp.split(output, [x_t.shape[-1]], axis=-1)
        eps = as_eps(prediction, x_t, t)
        return jnp.concatenate([eps, variance], axis=-1) if with_variance else eps

    def as_eps(output, x_t, t):
        if schedule.prediction_type == "epsilon" or schedule.is_flow:
            return output
        gamma_B, sigma_B = (jnp.take(table, t).astype(x_t.dtype) for table in (schedule.gamma, schedule.sigma))
        if schedule.rescale_betas_zero_snr:  # the samplers' gamma at pure noise, so that they find x_0 in eps there too
            gamma_B = jnp.maximum(gamma_B, FLOOR**0.5)
        return to_eps(output, x_t, gamma_B, sigma_B, schedule.prediction_type)

    return eps_fn
