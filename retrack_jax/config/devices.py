"""Batches and the devices at hand: what must divide, and what is changed so that it does."""

import dataclasses
import logging
import math

import jax

from retrack_jax import parallel
from retrack_jax.checks import check
from retrack_jax.config.options import Options
from retrack_jax.config.recipes import TrainingOptions, UnlearnOptions
from retrack_jax.unlearn.methods import METHODS, Method

log = logging.getLogger(__name__)


def fit_to_devices(options: Options) -> Options:
    """Returns `options` with fewer microbatches, and a larger batch of samples, if the devices at hand ask for it; logs both.

    The images of a step stay those of the recipe: D devices take the place of D microbatches. Either change moves results by
    rounding alone.

    Raises:
      UserError: a batch that a run of these options takes does not divide evenly over the devices.
    """
    methods = {name: _with_fewer_parts(recipe, "unlearn") for name, recipe in options.methods.items()}
    batch, devices = options.sampling.batch_size, jax.device_count()
    sampling = dataclasses.replace(options.sampling, batch_size=-(-batch // devices) * devices)
    if sampling.batch_size != batch:
        change = sampling.batch_size, batch, devices
        log.info("config.sampling.batch_size is %d in place of %d, a multiple of %d devices", *change)
    pretrain = _with_fewer_parts(options.pretrain, "pretrain")
    options = dataclasses.replace(options, methods=methods, sampling=sampling, pretrain=pretrain)
    _check(options)
    return options


def _with_fewer_parts(recipe: TrainingOptions, stage: str) -> TrainingOptions:
    if recipe.batch_size is None:
        return recipe
    devices, parts = jax.device_count(), recipe.accumulation
    whole = math.gcd(recipe.batch_size, getattr(recipe, "forget_batch_size", 0))
    each = whole // devices
    if whole % devices or not each % parts:
        return recipe
    fewer = max(number for number in range(1, parts + 1) if each % number == 0)
    change = stage, fewer, parts, recipe.batch_size, devices
    log.info("config.%s.accumulation is %d in place of %d: %d images per step over %d devices", *change)
    return dataclasses.replace(recipe, accumulation=fewer)


def _check(options: Options) -> None:
    names = options.method_names
    if not options.checkpoint or any(name in METHODS and METHODS[name].from_scratch for name in names):
        parallel.check_divisible("config.pretrain.batch_size", options.pretrain.batch_size, options.pretrain.accumulation)
    for name in names:
        if name in options.methods:
            check_unlearning_step(options.methods[name], METHODS[name], "config.unlearn.")
    if {"relearning_steps", "relearning_steps_remain"} & {*options.eval.metrics}:
        parallel.check_divisible("config.eval.relearning.batch_size", options.eval.relearning.batch_size)


def check_unlearning_step(recipe: UnlearnOptions, method: Method, where: str) -> None:
    """Raises `UserError` unless a step of `method` can take both batches of `recipe`. `where` goes before a field's name."""
    for name in ("batch_size", "forget_batch_size"):
        parallel.check_divisible(f"{where}{name}", getattr(recipe, name), recipe.accumulation)
    check(
        not method.paired or recipe.forget_batch_size in (0, recipe.batch_size),
        f"{where}forget_batch_size is {recipe.forget_batch_size}, but this method pairs forgotten with remaining images; "
        f"use {recipe.batch_size}, the batch size, or 0",
    )
