"""The noise schedule of a diffusion model as tables over t, with x_t = gamma_t x_0 + sigma_t eps:

    gamma_t = sqrt(alpha_bar_t),   sigma_t = sqrt(1 - alpha_bar_t)      betas (betas.py)
    gamma_t = 1 - sigma_t                                               rectified flow (flow.py)
    gamma_t = 1                                                         EDM (edm.py)

A schedule is read from a diffusers `scheduler_config.json` and written back as one (scheduler_config.py).
"""

import json
import logging
import numbers

import jax.numpy as jnp
import numpy as np
from flax import struct

from retrack_jax.checks import UserError, check, check_choice, check_int, check_number, suggestion
from retrack_jax.diffusion import edm, flow, scheduler_config
from retrack_jax.diffusion.betas import BETA_SCHEDULES, alpha_bar_table
from retrack_jax.diffusion.scheduler_config import CLASS_DEFAULTS, DEFAULTS, FLOOR, FLOORED
from retrack_jax.notation import Array

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", flow.VELOCITY)
LEARNED_VARIANCE = "learned_range"
VARIANCE_TYPES = ("fixed_small", "fixed_large", LEARNED_VARIANCE)
SPACINGS = ("leading", "trailing", "linspace")
_MOST_STEPS = 1_000_000  # of a file; its tables are made at once
_FROM_SETTINGS = object()  # of a table: computed from the settings
log = logging.getLogger(__name__)


def _static(default):
    return struct.field(pytree_node=False, default=default)


@struct.dataclass
class Schedule:
    """A noise schedule: three tables as leaves and all settings static, so that it passes through `jit`, `pmap` and `scan`.

    `Schedule()` is DDPM's; `Schedule.create` has the defaults of another of diffusers' classes, `Schedule.from_config` reads one,
    `Schedule.rectified_flow` makes that of a flow and `Schedule.edm` that of EDM.

    Attributes:
      alpha_bar, gamma, sigma: float32 [T], computed from the settings in float64 and rounded once. Without betas alpha_bar is
        that of the same signal-to-noise ratio, gamma^2/(gamma^2 + sigma^2), and sigma rises with t all the same.
      class_name: diffusers' class that `to_config` names.
      original: the config as JSON if `to_config` is to return it as it was read, else empty.
      The other names and meanings are those of diffusers' schedulers.

    Raises:
      UserError: a setting with a value of the wrong kind or range.
    """

    alpha_bar: Array = _FROM_SETTINGS
    gamma: Array = _FROM_SETTINGS
    sigma: Array = _FROM_SETTINGS
    num_train_timesteps: int = _static(1000)
    beta_start: float = _static(1e-4)
    beta_end: float = _static(0.02)
    beta_schedule: str = _static("linear")
    trained_betas: tuple[float, ...] | None = _static(None)
    prediction_type: str = _static("epsilon")
    timestep_spacing: str = _static("leading")
    steps_offset: int = _static(0)
    rescale_betas_zero_snr: bool = _static(False)
    clip_sample: bool = _static(True)
    clip_sample_range: float = _static(1.0)
    variance_type: str = _static("fixed_small")
    set_alpha_to_one: bool = _static(True)
    skip_prk_steps: bool = _static(False)
    sigma_min: float = _static(edm.SETTINGS["sigma_min"])
    sigma_max: float = _static(edm.SETTINGS["sigma_max"])
    sigma_data: float = _static(edm.SETTINGS["sigma_data"])
    sigma_schedule: str = _static(edm.SETTINGS["sigma_schedule"])
    rho: float = _static(edm.SETTINGS["rho"])
    solver_order: int = _static(2)
    solver_type: str = _static("midpoint")
    lower_order_final: bool = _static(True)
    euler_at_final: bool = _static(False)
    final_sigmas_type: str = _static("zero")
    shift: float = _static(1.0)
    class_name: str = _static("DDPMScheduler")
    original: str = _static("")

    def __post_init__(self):
        if self.alpha_bar is not _FROM_SETTINGS:  # a pytree that is put together again
            return
        _check(self._settings(), self.class_name)
        if self.trained_betas is not None:
            object.__setattr__(self, "trained_betas", tuple(float(beta) for beta in self.trained_betas))
        if self.has_betas:
            table = self.alpha_bar64
            gamma, sigma = np.sqrt(table), np.sqrt(1 - table)
        else:
            if self.is_edm:
                sigma = self.edm_sigmas(self.num_train_timesteps)[::-1]
                gamma = np.ones_like(sigma)
            else:
                sigma = flow.sigma_table(self.num_train_timesteps, self.shift)
                gamma = 1 - sigma
            table = gamma**2 / (gamma**2 + sigma**2)
        for name, values in (("alpha_bar", table), ("gamma", gamma), ("sigma", sigma)):
            object.__setattr__(self, name, jnp.asarray(np.float32(values)))

    @classmethod
    def create(cls, *, class_name: str = "DDPMScheduler", **settings) -> "Schedule":
        """Returns the schedule with diffusers' defaults for `class_name`, changed by `settings`.

        Raises:
          UserError: a setting with an unknown name, or with a value of the wrong kind or range.
        """
        check_choice("scheduler _class_name", class_name, CLASS_DEFAULTS)
        unknown = [name for name in settings if name not in (*DEFAULTS, "original")]
        if unknown:
            raise UserError(f"the schedule has no setting {unknown[0]!r}{suggestion(unknown[0], DEFAULTS)}")
        return cls(class_name=class_name, **{**CLASS_DEFAULTS[class_name], **settings})

    @classmethod
    def rectified_flow(cls, *, shift: float = 1.0, num_train_timesteps: int = 1000) -> "Schedule":
        """Returns the schedule of a network that predicts the velocity eps - x_0 at (1 - sigma) x_0 + sigma eps (flow.py).

        The network is called with `num_train_timesteps` times sigma, float32; sigma = 1 is pure noise.
        """
        return cls.create(class_name=flow.EULER, shift=shift, num_train_timesteps=num_train_timesteps)

    @classmethod
    def edm(cls, **settings) -> "Schedule":
        """Returns EDM's schedule (edm.py), of the paper unless `settings` say otherwise: sigma_min, sigma_max, sigma_data, rho,
        sigma_schedule, prediction_type, num_train_timesteps.

        The network is called with x_t/sqrt(sigma^2 + sigma_data^2) and log(sigma)/4, float32.
        """
        return cls.create(class_name=edm.EULER, **settings)

    @classmethod
    def from_config(cls, config: dict) -> "Schedule":
        """Returns the schedule that a diffusers `scheduler_config.json` of any version describes.

        `_class_name` is `DDPMScheduler` if absent; other keys that start with an underscore are ignored. Absent keys take the
        defaults of the class, and null means absent.

        Raises:
          UserError: a scheduler of another kind (neither betas, a flow nor EDM), an option or key that is not supported, or None,
            the config of a model that came without one.
        """
        class_name, settings, original = scheduler_config.read(config)
        schedule = cls.create(class_name=class_name, original=original, **settings)
        if schedule.rescale_betas_zero_snr and schedule.timestep_spacing != "trailing":
            log.warning(
                "the scheduler config sets rescale_betas_zero_snr with timestep_spacing %r; trailing is recommended, because the "
                "others may not start at pure noise",
                schedule.timestep_spacing,
            )
        return schedule

    def to_config(self) -> dict:
        """Returns the `scheduler_config.json` of this schedule; `from_config` reads back all that the class uses."""
        return json.loads(self.original) if self.original else scheduler_config.write(self.class_name, self._settings())

    def _settings(self) -> dict:
        return {name: getattr(self, name) for name in DEFAULTS}

    @property
    def is_flow(self) -> bool:
        """Whether the network predicts a velocity, and losses and samplers are in it; else both are in eps."""
        return self.prediction_type == flow.VELOCITY

    @property
    def is_edm(self) -> bool:
        """Whether gamma is 1 and the network's input and output are scaled; losses and samplers are in eps."""
        return self.class_name in edm.CLASSES

    @property
    def has_betas(self) -> bool:
        """Whether it is neither a flow's nor EDM's, so that gamma^2 + sigma^2 = 1."""
        return not (self.is_flow or self.is_edm)

    def edm_sigmas(self, count: int) -> np.ndarray:
        """Returns EDM's sigmas from the greatest to the least, float64 [count]."""
        names = ("sigma_min", "sigma_max", "rho", "sigma_schedule")
        return edm.sigmas(count, **{name: getattr(self, name) for name in names})

    def target(self, x_0: Array, eps: Array) -> Array:
        """Returns what the loss compares the prediction with, [B, ...]: eps, or for a flow the velocity eps - x_0."""
        return eps - x_0 if self.is_flow else eps

    def clean_weight(self, gamma_B: Array) -> Array:
        """Returns c [B], with which (x_t - c y)/sigma is the target if x_t was noised from y: gamma, or for a flow 1."""
        return jnp.ones_like(gamma_B) if self.is_flow else gamma_B

    def loss_weight(self, sigma_B: Array) -> Array | None:
        """Returns what makes a loss in eps one in the space that the network was trained in, [B]; None: 1."""
        return edm.loss_weight(sigma_B, self.sigma_data) if self.is_edm else None

    def network_time(self, t: Array) -> Array:
        """Returns what the network is given as time, [B]: the timestep; of a flow T sigma; of EDM log(sigma)/4.

        `t` is a row of the table, or, of a flow, T sigma, and of EDM sigma, as floats.
        """
        if self.is_edm:
            return jnp.log(self.sigma_at(t)) / 4
        if not self.is_flow or jnp.issubdtype(t.dtype, jnp.floating):
            return t
        return self.num_train_timesteps * self.sigma[t]

    def sigma_at(self, t: Array) -> Array:
        """Returns EDM's sigma [B] at `t`, rows of the table, or sigma itself as floats."""
        return t if jnp.issubdtype(t.dtype, jnp.floating) else self.sigma[t]

    @property
    def t_end(self) -> int:
        """Timesteps to train at lie below it: T, or T - 1 if the last is pure noise, where eps is x_t for any network."""
        return self.num_train_timesteps - self.rescale_betas_zero_snr

    @property
    def alpha_bar64(self) -> np.ndarray:
        """alpha_bar in float64 [T] on the host, from the static settings; samplers compute their tables from it.

        Raises:
          UserError: the schedule has no betas.
        """
        whose, instead = ("EDM's", "euler or dpm_solver") if self.is_edm else ("a flow's", "flow_euler or flow_heun")
        check(
            self.has_betas,
            f"this sampler needs betas, and the schedule is {whose}; set config.sampling.sampler to {instead}",
        )
        betas = self.beta_schedule, self.num_train_timesteps, self.beta_start, self.beta_end, self.trained_betas
        table = alpha_bar_table(*betas, self.rescale_betas_zero_snr)
        return np.maximum(table, FLOOR) if self.rescale_betas_zero_snr and self.class_name in FLOORED else table

    def alpha_bar_at(self, t: np.ndarray, final: float = 1.0) -> np.ndarray:
        """Returns alpha_bar in float64 at the timesteps `t`; a negative t, past the last step at clean data, gives `final`.

        Samplers divide by it, so alpha_bar = 0 is 2^-24 here, as it is in diffusers' Euler, UniPC and DPM-Solver schedulers.
        """
        t = np.asarray(t)
        table = np.maximum(self.alpha_bar64, FLOOR) if self.rescale_betas_zero_snr else self.alpha_bar64
        return np.where(t >= 0, table[np.maximum(t, 0)], final)

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


def _check(values: dict, class_name: str) -> None:
    for name, choices in (
        ("beta_schedule", BETA_SCHEDULES), ("prediction_type", PREDICTION_TYPES), ("variance_type", VARIANCE_TYPES),
        ("timestep_spacing", SPACINGS), ("solver_type", ("midpoint", "heun")), ("final_sigmas_type", ("zero", "sigma_min")),
    ):  # fmt: skip
        check_choice(name, values[name], choices)
    is_flow = class_name in flow.CLASSES
    check(
        is_flow == (values["prediction_type"] == flow.VELOCITY),
        f"prediction_type is {values['prediction_type']} and the scheduler is {class_name}: networks of flows predict "
        f"{flow.VELOCITY}, on the schedule of {flow.EULER}, and others do not; give the schedule that the network was trained on",
    )
    check(is_flow or values["shift"] == 1, f"shift is {values['shift']!r}, which is for flows; {class_name} has betas")
    check_number("shift", values["shift"], 0.0, above=True)
    edm.check_settings(class_name, values)
    for name, default in DEFAULTS.items():
        right = not isinstance(default, bool) or isinstance(values[name], bool)
        check(right, f"{name} is {values[name]!r}; it must be true or false")
    check_int("num_train_timesteps", values["num_train_timesteps"], 2, _MOST_STEPS)
    check_int("steps_offset", values["steps_offset"], 0, values["num_train_timesteps"] - 1)
    check_int("solver_order", values["solver_order"], 1, 2)
    check_number("clip_sample_range", values["clip_sample_range"], 0.0, above=True)
    check_number("beta_start", values["beta_start"], 0.0, 1.0, above=True)
    check_number("beta_end", values["beta_end"], values["beta_start"], 1.0)
    betas, steps = values["trained_betas"], values["num_train_timesteps"]
    if betas is not None:
        whole = isinstance(betas, (list, tuple, np.ndarray)) and len(betas) == steps
        check(
            whole and all(isinstance(beta, numbers.Real) and 0 < beta < 1 for beta in betas),
            f"trained_betas must be a list of num_train_timesteps = {steps} numbers in (0, 1)",
        )
    check(
        not values["rescale_betas_zero_snr"] or values["prediction_type"] != "epsilon",
        "rescale_betas_zero_snr needs prediction_type v_prediction or sample: at pure noise eps says nothing about the image",
    )
