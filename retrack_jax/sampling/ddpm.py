"""Ancestral sampling, "Denoising Diffusion Probabilistic Models" (arXiv 2006.11239), over any descending subset of timesteps.

With a = alpha_bar_t, a' = alpha_bar of the next timestep visited (1 after the last) and b = 1 - a/a', the step from t is

    (1) x_0  = (x_t - sigma_t eps) / gamma_t, clipped to ±clip_sample_range if clip_sample
    (2) mean = sqrt(a') b / (1 - a) x_0 + sqrt(a/a') (1 - a')/(1 - a) x_t
    (3) x    = mean + std noise
        std² = (1 - a')/(1 - a) b for fixed_small,  b for fixed_large,  0 at t = 0
        log std² = f log(b) + (1 - f) log((1 - a')/(1 - a) b),  f = (v + 1)/2, for learned_range

v are the channels that the network makes after those of eps ("Improved DDPM", arXiv 2102.09672).

As in diffusers, noise is added even at the last timestep if that is above 0 (steps_offset). With fixed_large it is visible.
"""

import jax.numpy as jnp
import numpy as np
from flax import struct

from retrack_jax.diffusion.schedule import LEARNED_VARIANCE, Schedule
from retrack_jax.notation import Array
from retrack_jax.sampling.loop import Sampler, float32_rows, predict_x0


@struct.dataclass
class DDPM(Sampler):
    """Ancestral DDPM; `num_steps` calls of the network."""

    clip: float | None = struct.field(pytree_node=False, default=None)
    stochastic = True

    @classmethod
    def create(cls, schedule: Schedule, num_steps: int | None = None, *, spacing: str | None = None) -> "DDPM":
        """Returns the sampler; without `num_steps` it visits every timestep T - 1, ..., 0, whatever the offset.

        With learned_range it takes an `eps_fn` with the channels v, as `make_eps_fn(..., with_variance=True)` returns it.
        """
        if num_steps is None:
            t = np.arange(schedule.num_train_timesteps)[::-1]
        else:
            t = schedule.timesteps(num_steps, spacing)
        now, then = schedule.alpha_bar64[t], schedule.alpha_bar_at(np.append(t[1:], -1))
        beta = 1 - now / then
        variance = beta if schedule.variance_type == "fixed_large" else np.maximum((1 - then) / (1 - now) * beta, 1e-20)
        rows = float32_rows(
            t,
            gamma=np.sqrt(schedule.alpha_bar_at(t)),  # only this is divided by: pure noise (zero SNR) is exact otherwise
            sigma=np.sqrt(1 - now),
            from_x0=np.sqrt(then) * beta / (1 - now),
            from_x=np.sqrt(now / then) * (1 - then) / (1 - now),
            std=np.where(t > 0, np.sqrt(variance), 0.0),
        )
        if schedule.variance_type == LEARNED_VARIANCE:  # `std` is the least
            rows |= {"log_ratio": np.float32(0.5 * np.log(beta / variance))}
        return cls(rows=rows, clip=float(schedule.clip_sample_range) if schedule.clip_sample else None)

    def step(self, state: tuple[Array], eps: Array, noise: Array, row: dict[str, Array]) -> tuple[Array]:
        """Returns the state at the next timestep: equations (1) to (3)."""
        (x,) = state
        std = row["std"]
        if "log_ratio" in row:
            eps, v = jnp.split(eps, [x.shape[-1]], axis=-1)
            std = std * jnp.exp((v + 1) / 2 * row["log_ratio"])
        x_0 = predict_x0(x, eps, row, self.clip)
        return (row["from_x0"] * x_0 + row["from_x"] * x + std * noise,)
