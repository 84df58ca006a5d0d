"""alpha_bar_t from the settings of a noise schedule.

    (1) beta_t      = linspace(beta_start, beta_end, T)                    linear
                    = linspace(sqrt(beta_start), sqrt(beta_end), T)²       scaled_linear
                    = min(1 - f((t+1)/T) / f(t/T), 0.999)                  squaredcos_cap_v2
                      f(s) = cos²((s + 0.008)/1.008 · pi/2)
    (2) alpha_bar_t = prod_{s <= t} (1 - beta_s)
    (3) gamma_t    <- (gamma_t - gamma_{T-1}) gamma_0 / (gamma_0 - gamma_{T-1}),   gamma = sqrt(alpha_bar)

Equation (3) is `rescale_betas_zero_snr`, algorithm 1 of arXiv 2305.08891: the last step is pure noise, alpha_bar_{T-1} = 0.

Tables are computed in float64. diffusers multiplies in float32, which changes alpha_bar by up to 1e-6 of itself, and by 1e-5 at
the end of squaredcos_cap_v2.
"""

import functools

import numpy as np

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


@functools.lru_cache(maxsize=32)
def alpha_bar_table(
    beta_schedule: str,
    num_train_timesteps: int,
    beta_start: float,
    beta_end: float,
    trained_betas: tuple[float, ...] | None = None,
    zero_snr: bool = False,
) -> np.ndarray:
    """Returns alpha_bar, float64 [T], read-only: equations (1) and (2), and (3) if `zero_snr`."""
    steps = num_train_timesteps
    if trained_betas is not None:
        betas = np.asarray(trained_betas, np.float64)
    elif beta_schedule == "linear":
        betas = np.linspace(beta_start, beta_end, steps)
    elif beta_schedule == "scaled_linear":
        betas = np.linspace(beta_start**0.5, beta_end**0.5, steps) ** 2
    else:
        share = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - share[1:] / share[:-1], 0.999)
    table = np.cumprod(1 - betas)
    if zero_snr:
        gamma = np.sqrt(table)
        table = ((gamma - gamma[-1]) * gamma[0] / (gamma[0] - gamma[-1])) ** 2
    table.flags.writeable = False
    return table
