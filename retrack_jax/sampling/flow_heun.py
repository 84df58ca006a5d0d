"""Heun's method for the ODE of a rectified flow, as diffusers' FlowMatchHeunDiscreteScheduler takes it without churn.

    (1) x_e = x + (sigma' - sigma) u(x, T sigma)
    (2) x'  = x + (sigma' - sigma) (u(x, T sigma) + u(x_e, T sigma')) / 2

The sigmas are those of flow_euler.py. The last step ends at sigma = 0, where no network was trained, and is (1) alone. So there
are 2 num_steps - 1 calls, and the method is of second order but for its last step.
"""

import jax.numpy as jnp
import numpy as np
from flax import struct

from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.notation import Array
from retrack_jax.sampling.flow_euler import visited_sigmas
from retrack_jax.sampling.loop import Sampler, float32_rows


@struct.dataclass
class FlowHeun(Sampler):
    """Heun's method; 2 `num_steps` - 1 calls of the network."""

    @classmethod
    def create(cls, schedule: Schedule, num_steps: int, *, spacing: str | None = None) -> "FlowHeun":
        """Returns the sampler."""
        sigma = visited_sigmas(schedule, num_steps, spacing)
        calls = np.arange(2 * num_steps - 1)
        rows = float32_rows(schedule.num_train_timesteps * sigma[(calls + 1) // 2], length=np.diff(sigma)[calls // 2])
        return cls(rows={**rows, "corrects": calls % 2 == 1})

    def init(self, x: Array) -> tuple[Array, Array, Array]:
        """Returns the state (x_t, where the step started, the velocity there)."""
        return (x, x, jnp.zeros_like(x))

    def step(self, state: tuple[Array, ...], velocity: Array, noise: None, row: dict[str, Array]) -> tuple[Array, ...]:
        """Returns the state after equation (1), or after (2) where the row corrects; `noise` is not used."""
        x, start, before = state
        start = jnp.where(row["corrects"], start, x)
        direction = jnp.where(row["corrects"], 0.5 * (before + velocity), velocity)
        return (start + row["length"] * direction, start, velocity)
