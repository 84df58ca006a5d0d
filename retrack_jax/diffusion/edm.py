"""EDM: noise without a shrinking image, and a network whose input and output are scaled.

    (1) x_t = x_0 + sigma eps,   gamma = 1,   sigma from sigma_min to sigma_max
    (2) D   = c_skip x_t + c_out F(c_in x_t, log(sigma)/4)           the predicted x_0; F is the network
        c_in = 1/s,  c_skip = sigma_data^2/s^2,  c_out = ±sigma sigma_data/s,  s^2 = sigma^2 + sigma_data^2
    (3) eps = (x_t - D)/sigma = (sigma/s) c_in x_t ∓ (sigma_data/s) F
    (4) sigma_i = (a + i/(n - 1) (b - a))^rho,  a = sigma_max^(1/rho),  b = sigma_min^(1/rho),  i = 0, ..., n - 1
        or (`exponential`) evenly spaced in log(sigma)
    (5) w = s^2/sigma_data^2,   ||F - F*||^2 = w ||eps - eps*||^2
    (6) log(sigma) ~ N(m, d^2)                                       the noise that networks are trained at

diffusers' prediction type `epsilon` stands for + in (2), and `v_prediction` for -. By (3) c_in x_t is the point of the
variance-preserving path of x_0/sigma_data with gamma' = sigma_data/s and sigma' = sigma/s, and ±F is its velocity -v or v.

Source: "Elucidating the Design Space of Diffusion-Based Generative Models" (arXiv 2206.00364), table 1.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax.checks import check, check_choice, check_number
from retrack_jax.notation import Array, Rng

EULER, DPM_SOLVER = "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"
SETTINGS = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "sigma_schedule": "karras", "rho": 7.0}
_COMMON = (*SETTINGS, "num_train_timesteps", "prediction_type", "final_sigmas_type")
# The classes that are read, each with its keys.
CLASSES = {
    EULER: _COMMON,
    DPM_SOLVER: (*_COMMON, "solver_order", "solver_type", "lower_order_final", "euler_at_final"),
}
LOG_NORMAL = (-1.2, 1.2)  # m and d of (6), as in the paper


def check_settings(class_name: str, values: Mapping[str, Any]) -> None:
    """Raises `UserError` for a setting of EDM's that is out of range, or that `class_name` does not read."""
    if class_name not in CLASSES:
        for name, default in SETTINGS.items():
            check(values[name] == default, f"{name} is {values[name]!r}, which is for EDM; {class_name} does not read it")
        return
    check_choice("sigma_schedule", values["sigma_schedule"], ("karras", "exponential"))
    check_choice(f"prediction_type of {class_name}", values["prediction_type"], ("epsilon", "v_prediction"))
    for name in ("sigma_min", "sigma_data"):
        check_number(name, values[name], 1e-6, 1e6)  # squares of sigma and of 1/sigma are float32
    check_number("sigma_max", values["sigma_max"], values["sigma_min"], 1e6, above=True)
    check_number("rho", values["rho"], 0.1, 1e3)


def sigmas(count: int, *, sigma_min: float, sigma_max: float, rho: float, sigma_schedule: str) -> np.ndarray:
    """Returns the sigmas of equation (4), float64 [count], falling; of one, sigma_max."""
    ramp = np.linspace(0, 1, count)
    if sigma_schedule == "exponential":
        return np.exp(np.log(sigma_max) + ramp * np.log(sigma_min / sigma_max))
    start, end = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (start + ramp * (end - start)) ** rho


def scales(sigma: Array, sigma_data: float) -> tuple[Array, Array, Array]:
    """Returns c_in, gamma' and sigma' of equations (2) and (3), each shaped as `sigma`."""
    s = jnp.sqrt(jnp.square(sigma) + sigma_data**2)
    return 1 / s, sigma_data / s, sigma / s


def loss_weight(sigma: Array, sigma_data: float) -> Array:
    """Returns w of equation (5), shaped as `sigma`: a loss in eps times w is the loss in the network's own output."""
    return 1 + jnp.square(sigma / sigma_data)


def draw_row(rng: Rng, sigma: Array, log_normal: tuple[float, float]) -> Array:
    """Returns the int32 index of the value in `sigma` [n], rising, that is nearest to a draw of (6) between its ends."""
    mean, deviation = log_normal
    log_sigma = jnp.log(sigma)
    normal = jax.random.truncated_normal(rng, (log_sigma[0] - mean) / deviation, (log_sigma[-1] - mean) / deviation)
    return jnp.searchsorted((log_sigma[1:] + log_sigma[:-1]) / 2, mean + deviation * normal).astype(jnp.int32)
