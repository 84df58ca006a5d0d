"""Config to objects. The config object stops here: everything below takes plain typed arguments."""

import logging
import math

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from retrack_jax import parallel
from retrack_jax.checks import UserError, check, check_choice, check_int, check_number
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.train.optimizer import LAM_SCHEDULES, LEARNING_RATE_SCHEDULES, make_ema_decay, make_lam_schedule, make_optimizer
from retrack_jax.train.step import StepOptions
from retrack_jax.unlearn.methods import ALL, METHODS, PRETRAINED, Method

log = logging.getLogger(__name__)

MODES = ("run", "pretrain", "unlearn", "sample", "eval", "report", "check")
RETAIN_LOSSES = ("standard", "distillation")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def check_config(config: ConfigDict) -> None:
    """Raises `UserError`, naming field, value and choices, for whatever can be told wrong before anything is loaded."""
    check_choice("config.method", config.method, (*METHODS, PRETRAINED, ALL))
    check_choice("config.mode", config.mode, MODES)
    check(len(config.seeds) > 0, "config.seeds is empty; give at least one, such as --config.seeds=0")
    for seed in config.seeds:
        check_int("config.seeds", seed, minimum=0, maximum=2**31 - 1)
    check(any(target_specs(config)), "config.targets is empty; name what to forget, such as --config.targets=label:7")
    check_int("config.log_every", config.log_every)
    check_int("config.checkpoint_every", config.checkpoint_every, minimum=0)
    check_choice("config.compute.dtype", config.compute.dtype, DTYPES)
    check_int("config.schedule.num_train_timesteps", config.schedule.num_train_timesteps, minimum=2)
    _check_sizes(config)
    from_scratch = config.method in METHODS and METHODS[config.method].from_scratch
    _check_training(config.pretrain, "config.pretrain.", takes_place=from_scratch or not config.checkpoint)
    if not config.checkpoint:  # which has a schedule of its own
        check_timesteps(config, config.schedule.num_train_timesteps)
    check_unlearning(config.unlearn, METHODS.get(config.method))
    sampling = config.sampling
    check_int("config.sampling.num_steps", sampling.num_steps)
    check_int("config.sampling.num_images", sampling.num_images)
    check_int("config.sampling.batch_size", sampling.batch_size)
    parallel.check_divisible("config.sampling.batch_size", sampling.batch_size)


def _check_training(recipe: ConfigDict, where: str, takes_place: bool = True) -> None:
    check_int(f"{where}num_steps", recipe.num_steps)
    check_int(f"{where}batch_size", recipe.batch_size)
    check_int(f"{where}accumulation", recipe.accumulation)
    check_int(f"{where}warmup_steps", recipe.warmup_steps, minimum=0)
    check_choice(f"{where}learning_rate_schedule", recipe.learning_rate_schedule, LEARNING_RATE_SCHEDULES)
    check_number(f"{where}learning_rate", recipe.learning_rate, 0.0, above=True)
    for name in ("b1", "b2"):
        check_number(f"{where}{name}", recipe[name], 0.0, 1.0)
        check(recipe[name] < 1.0, f"{where}{name} is {recipe[name]}; it must be below 1: an average of nothing divides by zero")
    for name in ("eps", "weight_decay", "clip_norm"):
        check_number(f"{where}{name}", recipe[name], 0.0)
    if takes_place:
        parallel.check_divisible(f"{where}batch_size", recipe.batch_size, recipe.accumulation)


def check_timesteps(config: ConfigDict, num_timesteps: int) -> None:
    """Raises `UserError` for timesteps that a schedule of `num_timesteps`, the config's or its checkpoint's, has not."""
    check_int("config.sampling.num_steps", config.sampling.num_steps, maximum=num_timesteps)
    check_window(config.unlearn, num_timesteps)


def check_window(recipe: ConfigDict, num_timesteps: int, where: str = "config.unlearn.") -> None:
    """Raises `UserError` unless [t_min, t_max) is a part of [0, `num_timesteps`)."""
    check_int(f"{where}t_min", recipe.t_min, minimum=0, maximum=num_timesteps - 1)
    if recipe.t_max is not None:
        check_int(f"{where}t_max", recipe.t_max, minimum=recipe.t_min + 1, maximum=num_timesteps)


def check_unlearning(recipe: ConfigDict, method: Method | None, where: str = "config.unlearn.") -> None:
    """Raises `UserError` for values of `config.unlearn` that no run can use, or, where one is given, none of `method`.

    `where` goes before a field's name in the message; options that only other methods read may be missing.
    """
    _check_training(recipe, where)
    if "lam" in recipe:
        check_number(f"{where}lam (lambda)", recipe.lam, 0.0, 1.0)
    check_choice(f"{where}lam_schedule", recipe.lam_schedule, LAM_SCHEDULES)
    if recipe.lam_schedule != "constant":
        check(recipe.lam_end is not None, f"{where}lam_end is not set; lam_schedule goes from lam to lam_end")
        check_number(f"{where}lam_end", recipe.lam_end, 0.0, 1.0)
    check_int(f"{where}num_neighbors", recipe.num_neighbors)
    check_choice(f"{where}neighbor_backend", recipe.neighbor_backend, ("auto", "scann", "exact"))
    check_choice(f"{where}retain_loss", recipe.retain_loss, RETAIN_LOSSES)
    for name in {"siss_scale", "siss_share", "erasediff_eta"} & set(recipe):
        check_number(f"{where}{name}", recipe[name], 0.0)
    check_int(f"{where}forget_batch_size", recipe.forget_batch_size, minimum=0)
    if recipe.forget_batch_size:
        parallel.check_divisible(f"{where}forget_batch_size", recipe.forget_batch_size, recipe.accumulation)
    if method is not None:
        forget_batch_size(recipe, method, where)


def _check_sizes(config: ConfigDict) -> None:
    for name in ("layers_per_block", "in_channels", "out_channels", "norm_num_groups"):
        if name in config.model:
            check_int(f"config.model.{name}", config.model[name])
    check_int("config.data.resolution", config.data.resolution, minimum=0)
    check_int("config.eval.grid_images", config.eval.grid_images)
    if "dropout" in config.model:
        check_number("config.model.dropout", config.model.dropout, 0.0, 1.0)
    pretrain = config.pretrain
    check_int("config.pretrain.seed", pretrain.seed, minimum=0, maximum=2**31 - 1)
    check_number("config.pretrain.ema_max_decay", pretrain.ema_max_decay, 0.0, 1.0)
    check_number("config.pretrain.ema_power", pretrain.ema_power, 0.0)
    check_number("config.pretrain.ema_inv_gamma", pretrain.ema_inv_gamma, 0.0, above=True)


def check_num_neighbors(config: ConfigDict, num_remain: int, spec: str) -> None:
    """Raises `UserError` where a method of the config asks for more neighbors than remain beside the target `spec`."""
    method, k = METHODS.get(config.method), config.unlearn.num_neighbors
    if config.method == ALL or (method is not None and "neighbors" in method.streams):
        few = f"config.unlearn.num_neighbors (K) is {k}, but only {num_remain} images remain beside {spec}; choose a smaller K"
        check(k <= num_remain, few)


def fit_to_devices(config: ConfigDict) -> ConfigDict:
    """Returns `config` with fewer microbatches, and a larger batch of samples, where the devices at hand ask for it; logs both.

    The images of a step stay those of the recipe: D devices take the place of D microbatches. Neither change touches a result
    beyond rounding. A batch that does not divide by the devices at all is left to `check_config`.

    Raises:
      UserError: one of these fields is no whole number above 0.
    """
    fitted, devices = config.copy_and_resolve_references(), jax.device_count()
    for stage in ("pretrain", "unlearn"):
        recipe = fitted[stage]
        check_int(f"config.{stage}.batch_size", recipe.batch_size)
        check_int(f"config.{stage}.accumulation", recipe.accumulation)
        check_int(f"config.{stage}.forget_batch_size", recipe.get("forget_batch_size", 0), minimum=0)
        whole, parts = math.gcd(recipe.batch_size, recipe.get("forget_batch_size", 0)), recipe.accumulation
        each = whole // devices
        if whole % devices == 0 and each % parts:
            recipe.accumulation = max(fewer for fewer in range(1, parts + 1) if each % fewer == 0)
            change = stage, recipe.accumulation, parts, recipe.batch_size, devices
            log.info("config.%s.accumulation is %d in place of %d: %d images per step over %d devices", *change)
    batch = fitted.sampling.batch_size
    check_int("config.sampling.batch_size", batch)
    fitted.sampling.batch_size = -(-batch // devices) * devices
    if fitted.sampling.batch_size != batch:
        change = fitted.sampling.batch_size, batch, devices
        log.info("config.sampling.batch_size is %d in place of %d, a multiple of %d devices", *change)
    return fitted


def target_specs(config: ConfigDict) -> list[str]:
    """Returns the targets, one per run; commas inside an entry separate targets as well."""
    return [spec.strip() for entry in config.targets for spec in str(entry).split(",") if spec.strip()]


def effective_config(config: ConfigDict, method: str) -> ConfigDict:
    """Returns the config of one method's run: under `all`, each method takes its own recipe."""
    one = config.copy_and_resolve_references()
    one.unlock()
    if config.method == ALL and method in config.get("recipes", {}):
        one.unlearn.update(config.recipes[method])
    one.method = method
    if "recipes" in one:
        del one.recipes
    one.lock()
    return one


def schedule_from(config: ConfigDict, checkpoint_schedule: dict | None) -> Schedule:
    """Returns the checkpoint's own schedule where it has one, else the config's."""
    return Schedule.from_config(checkpoint_schedule or config.schedule.to_dict())


def optimizer_from(recipe: ConfigDict) -> optax.GradientTransformation:
    """Returns the optimizer of `config.pretrain` or `config.unlearn`."""
    return make_optimizer(
        learning_rate=recipe.learning_rate,
        num_steps=recipe.num_steps,
        b1=recipe.b1,
        b2=recipe.b2,
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
        clip_norm=recipe.clip_norm,
        schedule=recipe.learning_rate_schedule,
        warmup_steps=recipe.warmup_steps,
    )


def relearning_optimizer_from(config: ConfigDict) -> optax.GradientTransformation:
    """Returns the optimizer of the relearning curves: the model's own recipe at a constant rate, `config.eval.relearning`'s."""
    recipe = config.pretrain
    return make_optimizer(
        learning_rate=config.eval.relearning.learning_rate,
        num_steps=1,
        b1=recipe.b1,
        b2=recipe.b2,
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
        clip_norm=recipe.clip_norm,
    )


def ema_decay_from(recipe: ConfigDict):
    """Returns `step -> decay` of `config.pretrain`, or None where it keeps no moving average."""
    if not recipe.ema_max_decay:
        return None
    return make_ema_decay(power=recipe.ema_power, inv_gamma=recipe.ema_inv_gamma, max_decay=recipe.ema_max_decay)


def unlearn_options_from(recipe: ConfigDict, method: Method, num_timesteps: int, dropout: bool) -> StepOptions:
    """Returns how a step of `config.unlearn` runs."""
    lam_fn = None
    if "lam" in method.options and recipe.lam_schedule != "constant":
        lam_fn = make_lam_schedule(recipe.lam, recipe.lam_end, recipe.num_steps, recipe.lam_schedule)
    return StepOptions(
        options={name: recipe.get(name, default) for name, default in method.options.items()},
        lam_fn=lam_fn,
        accumulation=recipe.accumulation,
        t_min=recipe.t_min,
        t_max=num_timesteps if recipe.t_max is None else recipe.t_max,
        distill=recipe.retain_loss == "distillation",
        dropout=dropout,
    )


def pretrain_options_from(recipe: ConfigDict, num_timesteps: int, dropout: bool) -> StepOptions:
    """Returns how a step of `config.pretrain` runs."""
    return StepOptions(accumulation=recipe.accumulation, t_max=num_timesteps, dropout=dropout)


def forget_batch_size(recipe: ConfigDict, method: Method, where: str = "config.unlearn.") -> int:
    """Returns how many forgotten images a step takes; methods that pair them with remaining ones need as many of both."""
    if "forget" not in method.streams:
        return 0
    size = recipe.forget_batch_size or recipe.batch_size
    if method.paired and size != recipe.batch_size:
        raise UserError(
            f"{where}forget_batch_size is {size}, but this method pairs forgotten with remaining images; "
            f"use {recipe.batch_size}, the batch size, or 0"
        )
    return size
