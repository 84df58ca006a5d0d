"""Euler's method for the ODE of a rectified flow, as diffusers' FlowMatchEulerDiscreteScheduler takes it.

    (1) dx/dsigma = u(x, T sigma)                 the velocity eps - x_0, which the network predicts
    (2) x'        = x + (sigma' - sigma) u
    (3) sigma_j   = shift(s_j),  s_j evenly spaced from the greatest to the least sigma of the training table; then 0

The table in (3) is shifted already (diffusion/flow.py), so that diffusers, and this, shift twice.
"""

import numpy as np
from flax import struct

from retrack_jax.checks import check, check_int
from retrack_jax.diffusion.flow import shifted, sigma_table
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.notation import Array
from retrack_jax.sampling.loop import Sampler, float32_rows


@struct.dataclass
class FlowEuler(Sampler):
    """Euler's method; `num_steps` calls of the network."""

    @classmethod
    def create(cls, schedule: Schedule, num_steps: int, *, spacing: str | None = None) -> "FlowEuler":
        """Returns the sampler."""
        sigma = visited_sigmas(schedule, num_steps, spacing)
        return cls(rows=float32_rows(schedule.num_train_timesteps * sigma[:-1], length=np.diff(sigma)))

    def step(self, state: tuple[Array], velocity: Array, noise: None, row: dict[str, Array]) -> tuple[Array]:
        """Returns the state at the next sigma: equation (2); `noise` is not used."""
        return (state[0] + row["length"] * velocity,)


def visited_sigmas(schedule: Schedule, num_steps: int, spacing: str | None) -> np.ndarray:
    """Returns the sigmas of equation (3) and the final 0, float64 [num_steps + 1], falling.

    Raises:
      UserError: the schedule is not a flow's, more steps than it has sigmas, or a spacing, of which a flow has no choice.
    """
    check(
        schedule.is_flow,
        "the samplers flow_euler and flow_heun are for flows, and this network's schedule has betas; choose ddpm, ddim, pndm or "
        "dpm_solver",
    )
    check(spacing is None, f"the spacing is {spacing!r}; the sigmas of a flow are spaced by its shift, so leave it out")
    check_int("the number of sampling steps", num_steps, 1, schedule.num_train_timesteps)
    table = sigma_table(schedule.num_train_timesteps, schedule.shift)
    return np.append(shifted(np.linspace(table[-1], table[0], num_steps), schedule.shift), 0.0)
