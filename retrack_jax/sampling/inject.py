"""Injection: noise an image to timestep t and denoise it again, to see what a model remembers of it (SSCD's protocol)."""

import jax.numpy as jnp

from retrack_jax.checks import check_int
from retrack_jax.diffusion.conversions import add_noise
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.notation import Array, EpsFn, Rng
from retrack_jax.sampling.ddpm import DDPM
from retrack_jax.sampling.loop import initial_noise, sample, start_at


def inject(eps_fn: EpsFn, x_0: Array, rngs: Rng, schedule: Schedule, *, t: int = 250) -> Array:
    """Returns the images [B, ...] that ancestral DDPM makes of `x_0` noised to `t`, in t + 1 calls of the network.

    This is the official protocol of ReTrack's SSCD: t = 250, and every timestep down to 0, with whatever sampler and steps the
    samples are drawn. Traceable; the caller compiles it.

    Args:
      eps_fn: `eps_fn(x_t [B, ...], t [B]) -> eps`, the parameters closed over.
      x_0: clean images [B, ...] in the space that the network denoises, one key in `rngs` [B] for each.
      t: how far to noise, in [0, T); raises `UserError` outside.
    """
    return sample(eps_fn, noised(x_0, rngs, schedule, t=t), rngs, start_at(DDPM.create(schedule), t))


def noised(x_0: Array, rngs: Rng, schedule: Schedule, *, t: int = 250) -> Array:
    """Returns `x_0` [B, ...] noised to `t`, from which `inject` starts. Arguments and errors are those of `inject`."""
    check_int("the injection timestep", t, 0, schedule.num_train_timesteps - 1)
    batch = x_0.shape[0]
    gamma_B, sigma_B = (jnp.full((batch,), table[t], x_0.dtype) for table in (schedule.gamma, schedule.sigma))
    return add_noise(x_0, initial_noise(rngs, x_0.shape[1:]), gamma_B, sigma_B)
