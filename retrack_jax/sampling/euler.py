"""Euler's method for the probability-flow ODE, as diffusers' EulerDiscreteScheduler takes it with its default of no added noise.

With s = sigma/gamma, at the visited timesteps t_0 > t_1 > ... and s = 0 past the last:

    (1) dx/ds = eps,  x = x_t / gamma_t        diffusers' variable; the network is given x_t
    (2) x'    = x + (s' - s) eps

In x_t itself: x_t' = (gamma'/gamma) x_t + gamma' (s' - s) eps. With the spacings `linspace` and `trailing`, diffusers starts from
noise of standard deviation s_0 in place of sqrt(1 + s_0^2), which is sigma_0 in x_t.

`linspace` visits whole timesteps here; diffusers visits fractions and interpolates s between them.

On EDM's schedule gamma is 1 and s is sigma. Steps and start are those of diffusers' EDMEulerScheduler without churn.
"""

import numpy as np
from flax import struct

from retrack_jax.checks import check, check_int
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.notation import Array
from retrack_jax.sampling.loop import Sampler, float32_rows


@struct.dataclass
class Euler(Sampler):
    """Euler's method; `num_steps` calls of the network."""

    @classmethod
    def create(cls, schedule: Schedule, num_steps: int, *, spacing: str | None = None) -> "Euler":
        """Returns the sampler."""
        if schedule.is_edm:
            sigma, start = edm_path(schedule, num_steps, spacing)
            return cls(rows=float32_rows(sigma[:-1], from_x=1.0, from_eps=np.diff(sigma)), start=start)
        spacing = spacing or schedule.timestep_spacing
        t = schedule.timesteps(num_steps, spacing)
        alpha_bar = np.append(schedule.alpha_bar_at(t), 1.0 if schedule.final_sigmas_type == "zero" else schedule.alpha_bar64[0])
        gamma, ratio = np.sqrt(alpha_bar), np.sqrt(1 / alpha_bar - 1)
        rows = float32_rows(t, from_x=gamma[1:] / gamma[:-1], from_eps=gamma[1:] * np.diff(ratio))
        return cls(rows=rows, start=1.0 if spacing == "leading" else float(np.sqrt(1 - alpha_bar[0])))

    def step(self, state: tuple[Array], eps: Array, noise: None, row: dict[str, Array]) -> tuple[Array]:
        """Returns the state at the next timestep: equation (2); `noise` is not used."""
        return (row["from_x"] * state[0] + row["from_eps"] * eps,)


def edm_path(schedule: Schedule, num_steps: int, spacing: str | None) -> tuple[np.ndarray, float]:
    """Returns (the sigmas visited and the final one, float64 [num_steps + 1], falling; the deviation of the initial noise).

    The deviation is diffusers' sqrt(sigma_max^2 + 1). Raises `UserError` for more steps than the schedule has sigmas, or a
    spacing, of which EDM has no choice.
    """
    check(spacing is None, f"the spacing is {spacing!r}; the sigmas of EDM are spaced by its sigma_schedule, so leave it out")
    check_int("the number of sampling steps", num_steps, 1, schedule.num_train_timesteps)
    final = 0.0 if schedule.final_sigmas_type == "zero" else schedule.sigma_min
    return np.append(schedule.edm_sigmas(num_steps), final), float(np.sqrt(schedule.sigma_max**2 + 1))
