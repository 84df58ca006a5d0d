"""Rectified flow: the straight path between an image and noise, and how diffusers writes down its schedule.

    (1) x_t = (1 - sigma) x_0 + sigma eps,   gamma = 1 - sigma
    (2) u   = eps - x_0                      the velocity dx_t/dsigma, which the network predicts
    (3) sigma_i = shift(s_i),  s_i = (i + 1)/T,  shift(s) = m s / (1 + (m - 1) s)

The table (3) is the one that diffusers' training scripts draw from, with i rising from little noise to pure noise; m is `shift`.
The network is called with the time T sigma, a float.

Sources: "Flow Straight and Fast" (arXiv 2209.03003); (3): "Scaling Rectified Flow Transformers" (arXiv 2403.03206).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from retrack_jax.checks import UserError, suggestion

VELOCITY = "flow_prediction"  # diffusers' name of what the network predicts
EULER, HEUN = "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"
CLASSES = (EULER, HEUN)
# Options of diffusers' samplers that would move the sigmas or the path, at the value that changes nothing.
_OFF = {
    "use_dynamic_shifting": False, "invert_sigmas": False, "shift_terminal": None, "use_karras_sigmas": False,
    "use_exponential_sigmas": False, "use_beta_sigmas": False, "stochastic_sampling": False,
}  # fmt: skip
# Options of dynamic shifting, which is off.
_HARMLESS = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type")


def shifted(sigma: np.ndarray, shift: float) -> np.ndarray:
    """Returns m s / (1 + (m - 1) s): more of the steps at high noise if the shift m is above 1."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sigma_table(num_train_timesteps: int, shift: float) -> np.ndarray:
    """Returns sigma, float64 [T], rising to 1: equation (3)."""
    return shifted(np.arange(1, num_train_timesteps + 1) / num_train_timesteps, shift)


def read(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings for `Schedule.create` of a flow's `scheduler_config.json` without its nulls.

    Raises:
      UserError: an option that is not supported, such as dynamic shifting, or an unknown key.
    """
    settings = {}
    for key, value in config.items():
        if key in ("num_train_timesteps", "shift", "prediction_type"):
            settings[key] = value
        elif key in _OFF:
            if value != _OFF[key]:
                raise UserError(f"the scheduler config of {name} sets {key} to {value!r}; flows are supported without it")
        elif not (key.startswith("_") or key in _HARMLESS):
            known = ("num_train_timesteps", "shift", *_OFF, *_HARMLESS)
            raise UserError(f"the scheduler config has the unknown key {key!r}{suggestion(key, known)}")
    return settings
