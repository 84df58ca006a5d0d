"""The noise schedule of a diffusion model as tables over t.

    (1) beta_t      = linspace(beta_start, beta_end, T)                    linear
                    = linspace(sqrt(beta_start), sqrt(beta_end), T)²       scaled_linear
                    = min(1 - f((t+1)/T) / f(t/T), 0.999)                  squaredcos_cap_v2
                      f(s) = cos²((s + 0.008)/1.008 · pi/2)
    (2) alpha_bar_t = prod_{s <= t} (1 - beta_s)
    (3) gamma_t     = sqrt(alpha_bar_t),   sigma_t = sqrt(1 - alpha_bar_t)

Tables are computed in float64 and rounded once. diffusers multiplies in float32, which changes alpha_bar by up to 1e-6 of itself,
and by 1e-5 at the end of squaredcos_cap_v2. A schedule is read from a diffusers `scheduler_config.json` and written back as one.
"""

import functools
import math

import jax.numpy as jnp
import numpy as np
from flax import struct

from retrack_jax.checks import UserError, check_choice, check_int, check_number, suggestion
from retrack_jax.notation import Array

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
VARIANCE_TYPES = ("fixed_small", "fixed_large")
SPACINGS = ("leading", "trailing", "linspace")
CLASS_NAMES = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler")

_DEFAULTS = {
    "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "trained_betas": None,
    "prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 0,
    "clip_sample": True, "clip_sample_range": 1.0, "variance_type": "fixed_small",
    "set_alpha_to_one": True, "skip_prk_steps": False,
    "solver_order": 2, "solver_type": "midpoint", "lower_order_final": True, "euler_at_final": False, "final_sigmas_type": "zero",
}  # fmt: skip
_COMMON = tuple(_DEFAULTS)[:8]
_DPM_KEYS = tuple(_DEFAULTS)[-5:]

# The keys that only one class of diffusers has, and its defaults if they differ from the table above. PNDM and DPM-Solver never
# clip, so a schedule from their files does not clip with our other samplers either, unless the file has the key.
_OWN = {
    "DDPMScheduler": ("clip_sample", "clip_sample_range", "variance_type"),
    "DDIMScheduler": ("clip_sample", "clip_sample_range", "set_alpha_to_one"),
    "PNDMScheduler": ("set_alpha_to_one", "skip_prk_steps"),
    "DPMSolverMultistepScheduler": _DPM_KEYS,
}
_CLASS_DEFAULTS = {
    "PNDMScheduler": {"set_alpha_to_one": False, "clip_sample": False},
    "DPMSolverMultistepScheduler": {"timestep_spacing": "linspace", "clip_sample": False},
}

# Keys without effect here: they belong to options that are off or refused, or to early versions.
_HARMLESS = (
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "flow_shift",
    "time_shift_type",
    "tensor_format",
    "timestep_values",
)
# Options supported at one value only, because any other would change the result.
_FIXED = {
    "thresholding": False, "rescale_betas_zero_snr": False, "use_karras_sigmas": False, "use_exponential_sigmas": False,
    "use_beta_sigmas": False, "use_lu_lambdas": False, "use_flow_sigmas": False, "use_dynamic_shifting": False,
    "algorithm_type": "dpmsolver++", "lambda_min_clipped": -math.inf,
}  # fmt: skip


@functools.lru_cache(maxsize=32)
def alpha_bar_table(
    beta_schedule: str,
    num_train_timesteps: int,
    beta_start: float,
    beta_end: float,
    trained_betas: tuple[float, ...] | None = None,
) -> np.ndarray:
    """Returns alpha_bar, float64 [T], read-only: equations (1) and (2)."""
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
    table.flags.writeable = False
    return table


def _static(default):
    return struct.field(pytree_node=False, default=default)


@struct.dataclass
class Schedule:
    """A noise schedule: three tables as leaves and all settings static, so that it passes through `jit`, `pmap` and `scan`.

    Create it with `Schedule.create` or `Schedule.from_config`, which compute the tables from the settings.

    Attributes:
      alpha_bar, gamma, sigma: float32 [T], equations (2) and (3).
      The other names and meanings are those of diffusers' schedulers; `class_name` is the one that `to_config` writes.
    """

    alpha_bar: Array
    gamma: Array
    sigma: Array
    num_train_timesteps: int = _static(1000)
    beta_start: float = _static(1e-4)
    beta_end: float = _static(0.02)
    beta_schedule: str = _static("linear")
    trained_betas: tuple[float, ...] | None = _static(None)
    prediction_type: str = _static("epsilon")
    timestep_spacing: str = _static("leading")
    steps_offset: int = _static(0)
    clip_sample: bool = _static(True)
    clip_sample_range: float = _static(1.0)
    variance_type: str = _static("fixed_small")
    set_alpha_to_one: bool = _static(True)
    skip_prk_steps: bool = _static(False)
    solver_order: int = _static(2)
    solver_type: str = _static("midpoint")
    lower_order_final: bool = _static(True)
    euler_at_final: bool = _static(False)
    final_sigmas_type: str = _static("zero")
    class_name: str = _static("DDPMScheduler")

    @classmethod
    def create(cls, *, class_name: str = "DDPMScheduler", **settings) -> "Schedule":
        """Returns the schedule with diffusers' defaults for `class_name`, changed by `settings`.

        Raises:
          UserError: a setting with an unknown name, or with a value of the wrong kind or range.
        """
        check_choice("scheduler _class_name", class_name, CLASS_NAMES)
        unknown = [name for name in settings if name not in _DEFAULTS]
        if unknown:
            raise UserError(f"the schedule has no setting {unknown[0]!r}{suggestion(unknown[0], _DEFAULTS)}")
        values = {**_DEFAULTS, **_CLASS_DEFAULTS.get(class_name, {}), **settings}
        if values["trained_betas"] is not None:
            values["trained_betas"] = tuple(float(beta) for beta in values["trained_betas"])
        _check(values)
        betas = (values[name] for name in ("beta_schedule", "num_train_timesteps", "beta_start", "beta_end", "trained_betas"))
        alpha_bar = alpha_bar_table(*betas)
        tables = (np.float32(table) for table in (alpha_bar, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)))
        return cls(*(jnp.asarray(table) for table in tables), class_name=class_name, **values)

    @classmethod
    def from_config(cls, config: dict) -> "Schedule":
        """Returns the schedule that a diffusers `scheduler_config.json` of any version describes.

        `_class_name` is `DDPMScheduler` if absent; other keys that start with an underscore are ignored. Absent keys take the
        defaults of the class, and null means absent.

        Raises:
          UserError: a scheduler, option or key that is not supported, or None, the config of a model that came without one.
        """
        if config is None:
            raise UserError("there is no scheduler_config.json to make a schedule of; use Schedule.create(...) with its settings")
        config = {key: value for key, value in dict(config).items() if value is not None}
        class_name = config.get("_class_name", "DDPMScheduler")
        settings = {}
        for key, value in config.items():
            if key == "predict_epsilon":  # diffusers before 0.9
                settings.setdefault("prediction_type", "epsilon" if value else "sample")
            elif key in _DEFAULTS:
                settings[key] = value
            elif key in _FIXED:
                if value not in (_FIXED[key], str(_FIXED[key])):
                    raise UserError(
                        f"the scheduler config sets {key} to {value!r}, which is not supported; only {_FIXED[key]!r} is"
                    )
            elif not key.startswith("_") and key not in _HARMLESS:
                known = (*_DEFAULTS, *_FIXED, *_HARMLESS)
                raise UserError(f"the scheduler config has the unknown key {key!r}{suggestion(key, known)}")
        return cls.create(class_name=class_name, **settings)

    def to_config(self) -> dict:
        """Returns the `scheduler_config.json` of this schedule; `from_config` reads back all that the class uses."""
        config = {"_class_name": self.class_name}
        for name in _COMMON + _OWN[self.class_name]:
            value = getattr(self, name)
            config[name] = list(value) if isinstance(value, tuple) else value
        if self.class_name in _CLASS_DEFAULTS:  # that class has no such key, but another scheduler may be created from the file
            config["clip_sample"] = self.clip_sample
        return config

    @property
    def alpha_bar64(self) -> np.ndarray:
        """alpha_bar in float64 [T] on the host, from the static settings; samplers compute their tables from it."""
        return alpha_bar_table(self.beta_schedule, self.num_train_timesteps, self.beta_start, self.beta_end, self.trained_betas)

    def alpha_bar_at(self, t: np.ndarray, final: float = 1.0) -> np.ndarray:
        """Returns alpha_bar in float64 at the timesteps `t`; a negative t, past the last step at clean data, gives `final`."""
        t = np.asarray(t)
        return np.where(t >= 0, self.alpha_bar64[np.maximum(t, 0)], final)

    def timesteps(self, num_steps: int, spacing: str | None = None) -> np.ndarray:
        """Returns the timesteps that a sampler of `num_steps` steps visits: int32 [num_steps], descending.

        With T = 1000 and 50 steps `leading` gives 980, 960, ..., 0 (plus `steps_offset`), `trailing` 999, 979, ..., 19, and
        `linspace` 999, ..., 0. `spacing` defaults to the schedule's own.

        Raises:
          UserError: more steps than timesteps, or an offset that leaves the table.
        """
        total = self.num_train_timesteps
        spacing = spacing or self.timestep_spacing
        check_int("the number of sampling steps", num_steps, 1, total)
        check_choice("timestep_spacing", spacing, SPACINGS)
        if spacing == "leading":
            visited = np.arange(num_steps)[::-1] * (total // num_steps) + self.steps_offset
        elif spacing == "trailing":
            # If total / num_steps rounds down, arange has one more entry just above 0, and diffusers visits t = -1 too.
            visited = np.round(np.arange(total, 0, -total / num_steps)[:num_steps]) - 1
        else:
            visited = np.linspace(0, total - 1, num_steps).round()[::-1]
        return self.within_table(visited)

    def within_table(self, visited: np.ndarray) -> np.ndarray:
        """Returns descending timesteps as int32. Raises `UserError` if the offset makes them start past the table."""
        last = self.num_train_timesteps - 1
        if visited[0] > last:
            raise UserError(
                f"{len(visited)} steps with steps_offset {self.steps_offset} start at t = {visited[0]}, past {last}; use fewer"
            )
        return visited.astype(np.int32)


def _check(values: dict) -> None:
    for name, choices in (
        ("beta_schedule", BETA_SCHEDULES), ("prediction_type", PREDICTION_TYPES), ("variance_type", VARIANCE_TYPES),
        ("timestep_spacing", SPACINGS), ("solver_type", ("midpoint", "heun")), ("final_sigmas_type", ("zero", "sigma_min")),
    ):  # fmt: skip
        check_choice(name, values[name], choices)
    for name in ("clip_sample", "set_alpha_to_one", "skip_prk_steps", "lower_order_final", "euler_at_final"):
        if not isinstance(values[name], bool):
            raise UserError(f"{name} is {values[name]!r}; it must be true or false")
    check_int("num_train_timesteps", values["num_train_timesteps"], 2)
    check_int("steps_offset", values["steps_offset"], 0, values["num_train_timesteps"] - 1)
    check_int("solver_order", values["solver_order"], 1, 2)
    check_number("clip_sample_range", values["clip_sample_range"], 0.0, above=True)
    check_number("beta_start", values["beta_start"], 0.0, 1.0, above=True)
    check_number("beta_end", values["beta_end"], values["beta_start"], 1.0)
    betas = values["trained_betas"]
    if betas is not None and (len(betas) != values["num_train_timesteps"] or not all(0 < beta < 1 for beta in betas)):
        raise UserError(
            f"trained_betas must hold num_train_timesteps = {values['num_train_timesteps']} numbers in (0, 1), has {len(betas)}"
        )
