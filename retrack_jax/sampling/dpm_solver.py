"""DPM-Solver++(2M), "DPM-Solver++" (arXiv 2211.01095, algorithm 2): a second-order multistep solver of the probability-flow ODE.

lambda = log(gamma/sigma); h = lambda' - lambda for the step from t to t', and h_0 for the step before it; m is the predicted x_0.

    (1) D  = m + (m - m_before) h / (2 h_0)                                       `midpoint`
    (2) x' = (sigma'/sigma) x - gamma' (exp(-h) - 1) D
    (3) x' = (sigma'/sigma) x - gamma' (exp(-h) - 1) m + gamma' ((exp(-h) - 1)/h + 1) (m - m_before) h / h_0       `heun`

The first step is of first order (D = m). The last step is too, as in diffusers, if it ends at sigma = 0 (`final_sigmas_type`
zero), where h is infinite; with `euler_at_final`; and with `lower_order_final` and fewer than 15 steps. x_0 is not clipped.

On EDM's schedule gamma is 1, and sigmas and start are those of euler.py, as in diffusers' EDMDPMSolverMultistepScheduler. With
`sigma_min` its last step has no length.

Timesteps are spaced as in diffusers' DPMSolverMultistepScheduler, which differs from its other schedulers: `linspace` and
`leading` divide the table by num_steps + 1 points and leave out the last.
"""

import numpy as np
from flax import struct

from retrack_jax.checks import check_choice, check_int
from retrack_jax.diffusion.schedule import SPACINGS, Schedule
from retrack_jax.notation import Array
from retrack_jax.sampling.euler import edm_path
from retrack_jax.sampling.loop import Sampler, float32_rows, predict_x0


@struct.dataclass
class DPMSolver(Sampler):
    """DPM-Solver++(2M); `num_steps` calls of the network."""

    @classmethod
    def create(cls, schedule: Schedule, num_steps: int, *, spacing: str | None = None) -> "DPMSolver":
        """Returns the sampler; `spacing` is `linspace` by default, unless a DPMSolverMultistepScheduler's file sets another."""
        start = 1.0
        if schedule.is_edm:
            sigma, start = edm_path(schedule, num_steps, spacing)
            t, gamma = sigma[:-1], np.ones_like(sigma)
        else:
            if spacing is None:
                spacing = schedule.timestep_spacing if schedule.class_name == "DPMSolverMultistepScheduler" else "linspace"
            t = timesteps(schedule, num_steps, spacing)
            end = 1.0 if schedule.final_sigmas_type == "zero" else schedule.alpha_bar64[0]
            alpha_bar = np.append(schedule.alpha_bar_at(t), end)
            gamma, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
        with np.errstate(divide="ignore"):  # lambda is infinite at sigma = 0
            log_snr = np.log(gamma) - np.log(sigma)
        h = np.diff(log_snr)
        gain = -gamma[1:] * np.expm1(-h)
        ratio = np.append(0.0, h[1:] / h[:-1])  # h / h_0; with 0 the first step is of first order
        last_is_first_order = (
            schedule.euler_at_final or schedule.final_sigmas_type == "zero" or (schedule.lower_order_final and num_steps < 15)
        )
        if schedule.solver_order == 1:
            ratio[:] = 0.0
        elif last_is_first_order:
            ratio[-1] = 0.0
        if schedule.solver_type == "midpoint":
            slope = 0.5 * gain * ratio
        else:
            shape = np.divide(np.expm1(-h), h, out=np.full_like(h, -1.0), where=h != 0)
            slope = gamma[1:] * (shape + 1) * ratio
        rows = float32_rows(
            t,
            gamma=gamma[:-1],
            sigma=sigma[:-1],
            from_x=sigma[1:] / sigma[:-1],
            from_x0=gain,
            from_slope=slope,
        )
        return cls(rows=rows, start=start)

    def init(self, x: Array) -> tuple[Array, Array]:
        """Returns the state (x_t, the x_0 predicted one step before); the first row gives the latter no weight."""
        return (self.start * x, x)

    def step(self, state: tuple[Array, Array], eps: Array, noise: None, row: dict[str, Array]) -> tuple[Array, Array]:
        """Returns the state at the next timestep: equations (1) to (3); `noise` is not used."""
        x, x_0_before = state
        x_0 = predict_x0(x, eps, row, clip=None)
        return (row["from_x"] * x + row["from_x0"] * x_0 + row["from_slope"] * (x_0 - x_0_before), x_0)


def timesteps(schedule: Schedule, num_steps: int, spacing: str) -> np.ndarray:
    """Returns the timesteps visited, int32 [num_steps], descending, as DPMSolverMultistepScheduler spaces them.

    Raises:
      UserError: so many steps that two timesteps would coincide (as many as timesteps; with `trailing`, more), or an offset that
        leaves the table.
    """
    total = schedule.num_train_timesteps
    check_choice("timestep_spacing", spacing, SPACINGS)
    check_int("the number of DPM-Solver++ steps", num_steps, 1, total if spacing == "trailing" else total - 1)
    if spacing == "trailing":
        return schedule.timesteps(num_steps, "trailing")
    if spacing == "linspace":
        visited = np.linspace(0, total - 1, num_steps + 1).round()
    else:
        visited = np.arange(num_steps + 1) * (total // (num_steps + 1)) + schedule.steps_offset
    return schedule.within_table(visited[:0:-1])
