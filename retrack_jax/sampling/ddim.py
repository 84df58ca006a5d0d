"""Deterministic DDIM, "Denoising Diffusion Implicit Models" (arXiv 2010.02502), eta = 0.

With a' = alpha_bar at t' = t - floor(T / num_steps), which diffusers takes even if the visited timesteps are spaced otherwise,
the step is

    (1) x_0 = (x_t - sigma_t eps) / gamma_t, clipped to ±clip_sample_range if clip_sample
    (2) x   = sqrt(a') x_0 + sqrt(1 - a') eps          eps as predicted: clipping x_0 does not change it

Past the last step (t' < 0), a' is 1, or alpha_bar_0 if `set_alpha_to_one` is false. This is the Euler method for the
probability-flow ODE in sigma/gamma, so it is of first order.
"""

import numpy as np
from flax import struct

from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.notation import Array
from retrack_jax.sampling.loop import Sampler, float32_rows, predict_x0


@struct.dataclass
class DDIM(Sampler):
    """Deterministic DDIM; `num_steps` calls of the network."""

    clip: float | None = struct.field(pytree_node=False, default=None)

    @classmethod
    def create(cls, schedule: Schedule, num_steps: int, *, spacing: str | None = None) -> "DDIM":
        """Returns the sampler."""
        t = schedule.timesteps(num_steps, spacing)
        final = 1.0 if schedule.set_alpha_to_one else schedule.alpha_bar64[0]
        now = schedule.alpha_bar_at(t)
        then = schedule.alpha_bar_at(t - schedule.num_train_timesteps // num_steps, final)
        # At pure noise (zero SNR) eps holds so much of v = -x_0, from which x_0 is found, in addition to x_t.
        share_of_v = np.sqrt(now) - np.sqrt(schedule.alpha_bar64[t])
        at_now = {"gamma": np.sqrt(now), "sigma": np.sqrt(1 - now)}
        next_gamma = np.sqrt(then) + np.sqrt(1 - then) * share_of_v
        rows = float32_rows(t, **at_now, next_gamma=next_gamma, next_sigma=np.sqrt(1 - then))
        return cls(rows=rows, clip=float(schedule.clip_sample_range) if schedule.clip_sample else None)

    def step(self, state: tuple[Array], eps: Array, noise: None, row: dict[str, Array]) -> tuple[Array]:
        """Returns the state at the next timestep: equations (1) and (2); `noise` is not used."""
        (x,) = state
        return (row["next_gamma"] * predict_x0(x, eps, row, self.clip) + row["next_sigma"] * eps,)
