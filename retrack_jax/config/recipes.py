"""How a network is trained and unlearned: `config.pretrain` and `config.unlearn`, typed and self-checking as in options.py."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import optax

from retrack_jax.checks import check, check_choice, check_int, check_number
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.neighbors.search import BACKENDS
from retrack_jax.notation import Array
from retrack_jax.train.lora import ADAPTERS, EVERY_WEIGHT, LoraOptions
from retrack_jax.train.optimizer import LEARNING_RATE_SCHEDULES, make_ema_decay, make_optimizer, make_rate
from retrack_jax.train.step import StepOptions
from retrack_jax.unlearn.calibration import UNSEEN
from retrack_jax.unlearn.methods import Method
from retrack_jax.unlearn.options import MethodOptions

RETAIN_LOSSES = ("standard", "distillation")
MAX_SEED = 2**31 - 1
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What pretraining and unlearning have in common: AdamW's settings and the size of a step.

    A number that is None is left to the rules for data without a recipe (config/rules.py).
    """

    num_steps: int | None
    batch_size: int | None = 128  # images per step, over all devices and microbatches
    accumulation: int | None = 1  # microbatches per step; a CPU may take more (config/devices.py)
    learning_rate: float | None
    learning_rate_schedule: str = "constant"  # `constant` or `cosine`
    warmup_steps: int = 0
    b1: float = 0.95
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-6
    clip_norm: float = 0.0  # of the gradient of a sum over pixels; 0: none
    logit_normal: tuple | None = None  # (m, s): t at sigmoid(m + s z) of its range, z normal; (): uniform; None: (), SD3: (0, 1)
    log_normal: tuple | None = None  # (m, s), of EDM alone: log(sigma) is m + s z; (): t is uniform; None: (-1.2, 1.2)
    ema_max_decay: float = 0.0  # of a moving average of the weights, which is the result; 0: no moving average
    ema_power: float = 0.75
    ema_inv_gamma: float = 1.0

    def __post_init__(self):
        for name in ("num_steps", "batch_size", "accumulation"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name))
        check_int("warmup_steps", self.warmup_steps, minimum=0)
        check_choice("learning_rate_schedule", self.learning_rate_schedule, LEARNING_RATE_SCHEDULES)
        if self.learning_rate is not None:
            check_number("learning_rate", self.learning_rate, 0.0, above=True)
        for name in ("b1", "b2"):
            value = getattr(self, name)
            check_number(name, value, 0.0, 1.0)
            check(value < 1.0, f"{name} is {value}; it must be below 1: an average of nothing divides by zero")
        for name in ("eps", "weight_decay", "clip_norm"):
            check_number(name, getattr(self, name), 0.0)
        for name, of in (("logit_normal", "the logit"), ("log_normal", "log(sigma)")):
            if value := getattr(self, name):
                pair = isinstance(value, (tuple, list)) and len(value) == 2
                check(pair, f"{name} is {value!r}; give two numbers, the mean and the deviation of {of}")
                check_number(f"the first of {name}", value[0])
                check_number(f"the second of {name}", value[1], 0.0, above=True)
                object.__setattr__(self, name, tuple(value))
        check(not (self.logit_normal and self.log_normal), "logit_normal and log_normal are both set; choose one")
        check_number("ema_max_decay", self.ema_max_decay, 0.0, 1.0)
        check_number("ema_power", self.ema_power, 0.0)
        check_number("ema_inv_gamma", self.ema_inv_gamma, 0.0, above=True)
        for name in ("ema_power", "ema_inv_gamma"):
            value, default = getattr(self, name), getattr(TrainingOptions, name)
            unread = not self.ema_max_decay and value != default
            check(not unread, f"{name} is {value}, and there is no moving average; set ema_max_decay, or leave it out")

    def check_draws(self, schedule: Schedule, where: str) -> None:
        """Raises `UserError` if `log_normal` is set and `schedule` is not EDM's."""
        check(
            schedule.is_edm or not self.log_normal,
            f"{where}log_normal is {self.log_normal}, which is for EDM's sigmas, and the schedule is {schedule.class_name}'s; "
            "leave it out",
        )

    def warn_of_warmup(self, where: str) -> None:
        """Warns if training ends before the rate of a cosine has risen, as in a short try of a long recipe."""
        if self.learning_rate_schedule == "cosine" and self.warmup_steps >= (self.num_steps or math.inf):
            log.warning(
                "%s.warmup_steps is %d, and in %d steps the rate neither rises to learning_rate nor falls to 0",
                where, self.warmup_steps, self.num_steps,
            )  # fmt: skip

    def rate(self) -> optax.Schedule:
        """Returns `step -> learning rate`."""
        return make_rate(self.learning_rate, self.num_steps or 1, self.learning_rate_schedule, self.warmup_steps)

    def optimizer(self) -> optax.GradientTransformation:
        """Returns AdamW as these options describe it."""
        constant = self.learning_rate_schedule == "constant" and not self.warmup_steps  # then the state needs no counter of steps
        rate = self.learning_rate if constant else self.rate()
        own = {name: getattr(self, name) for name in ("b1", "b2", "eps", "weight_decay", "clip_norm")}
        return make_optimizer(learning_rate=rate, **own)

    def ema_decay(self) -> Callable[[Array], Array] | None:
        """Returns `step -> decay` of the moving average, or None if there is none."""
        if not self.ema_max_decay:
            return None
        return make_ema_decay(power=self.ema_power, inv_gamma=self.ema_inv_gamma, max_decay=self.ema_max_decay)

    def step_options(self, t_end: int, dropout: bool, condition_dropout: float = 0.0) -> StepOptions:
        """Returns how a step runs, on a schedule that ends at `t_end`; `dropout`: whether the network has any."""
        return StepOptions(
            accumulation=self.accumulation,
            t_max=t_end,
            logit_normal=self.logit_normal,
            log_normal=self.log_normal,
            dropout=dropout,
            condition_dropout=condition_dropout,
        )


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(TrainingOptions):
    """`config.pretrain`: from random weights, with or without the forgotten images (SISS's recipe for MNIST)."""

    num_steps: int | None = 117_500  # None: the config has no recipe, and its model comes from a checkpoint
    learning_rate: float | None = 1e-4
    learning_rate_schedule: str = "cosine"
    warmup_steps: int = 500
    ema_max_decay: float = 0.9999
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_int("seed", self.seed, minimum=0, maximum=MAX_SEED)


@dataclass(frozen=True, kw_only=True)
class UnlearnOptions(TrainingOptions):
    """`config.unlearn`: what all methods share; what one method alone has is set under its name."""

    num_steps: int | None = 50
    learning_rate: float | None = 5e-5
    clip_norm: float = 1.0
    forget_batch_size: int = 0  # noisy copies of forgotten images per step; 0: as many as remaining ones
    num_neighbors: int | None = 10  # K
    neighbor_backend: str = "auto"  # or scann, exact
    t_min: int = 0  # timesteps are drawn from [t_min, t_max); of flows and EDM, rows of a table of sigmas, rising
    t_max: int | None = None  # None: all that the schedule has, but a last step of pure noise (zero SNR)
    retain_loss: str = "standard"  # or distillation: match the pretrained model
    adapter: str | None = None  # lora trains the matrices of `lora`, none every weight; None: none, but lora for XL and SD3
    lora: LoraOptions = LoraOptions()
    calibrate: str = ""  # afterwards go to where the forgotten loss is: unseen (as the verdict estimates it), or a number
    own: MethodOptions = MethodOptions()

    def __post_init__(self):
        super().__post_init__()
        check_int("forget_batch_size", self.forget_batch_size, minimum=0)
        if self.num_neighbors is not None:
            check_int("num_neighbors", self.num_neighbors)
        check_choice("neighbor_backend", self.neighbor_backend, BACKENDS)
        check_choice("retain_loss", self.retain_loss, RETAIN_LOSSES)
        if self.adapter is not None:
            check_choice("adapter", self.adapter, ADAPTERS)
        check(isinstance(self.lora, LoraOptions), f"lora is {self.lora!r}; give a dict such as {{'rank': 8}}")
        _check_calibrate(self.calibrate)
        check_int("t_min", self.t_min, minimum=0)
        if self.t_max is not None:
            check_int("t_max", self.t_max, minimum=self.t_min + 1)

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained, and not every weight."""
        return self.adapter not in (None, EVERY_WEIGHT)

    def check_adapter(self, where: str = "config.unlearn.") -> None:
        """Raises `UserError` if `lora` is set and no adapter is trained."""
        unused = not self.has_adapter and self.lora != LoraOptions()
        trained = f"{where}adapter is {self.adapter}, which trains every weight"
        check(not unused, f"{where}lora is set, but {trained}; set it to lora")

    def check_window(self, num_timesteps: int, where: str = "config.unlearn.") -> None:
        """Raises `UserError` unless [t_min, t_max) is a part of [0, `num_timesteps`)."""
        check_int(f"{where}t_min", self.t_min, minimum=0, maximum=num_timesteps - 1)
        if self.t_max is not None:
            check_int(f"{where}t_max", self.t_max, minimum=self.t_min + 1, maximum=num_timesteps)

    def step_options(self, t_end: int, dropout: bool, condition_dropout: float = 0.0) -> StepOptions:
        how = super().step_options(t_end if self.t_max is None else self.t_max, dropout, condition_dropout)
        distill, lora = self.retain_loss == "distillation", self.lora if self.has_adapter else None
        return replace(how, options=self.own, num_steps=self.num_steps, t_min=self.t_min, distill=distill, lora=lora)

    def remain_size(self, method: Method) -> int:
        """Returns how many remaining images a step of `method` takes."""
        return self.batch_size if "remain" in method.streams else 0

    def forget_size(self, method: Method) -> int:
        """Returns how many forgotten images a step of `method` takes."""
        return (self.forget_batch_size or self.batch_size) if "forget" in method.streams else 0

    def images_of_a_pass(self, method: Method) -> int:
        """Returns how many images the network takes at once in a step of `method`, over all devices and microbatches."""
        return (sum if method.one_pass else max)((self.remain_size(method), self.forget_size(method)))


def _check_calibrate(value: str) -> None:
    """Raises `UserError` unless `value` is empty, "unseen" or a number above 0, as text."""
    try:
        valid = value in ("", UNSEEN) or 0 < float(value) < math.inf
    except ValueError:
        valid = False
    check(valid, f"calibrate is {value!r}; give {UNSEEN}, a loss above 0 to reach, such as 26.9, or leave it empty")
