"""Batches and the devices at hand: what must divide, and what is changed so that it does."""

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

import jax

from retrack_jax import parallel
from retrack_jax.checks import check
from retrack_jax.config.options import Options
from retrack_jax.config.recipes import TrainingOptions, UnlearnOptions
from retrack_jax.models.cpu.microbatch import images_at_once
from retrack_jax.unlearn.methods import METHODS, Method
from retrack_jax.weights.kinds import network_config

log = logging.getLogger(__name__)


def fit_to_devices(options: Options) -> Options:
    """Returns `options` with other microbatches, and a larger batch of samples, if the devices at hand ask for it; logs both.

    The images of a step stay those of the recipe: D devices take the place of D microbatches, and a CPU takes as many
    microbatches as its cache asks for (`models/cpu/microbatch.py`). Either change moves results by rounding alone.

    Raises:
      UserError: a batch that a run of these options takes does not divide evenly over the devices.
    """
    network = _network(options)
    methods, pretrain = {**options.methods}, options.pretrain
    for name in [name for name in options.method_names if name in methods]:
        recipe, method = methods[name], METHODS[name]
        methods[name] = with_microbatches(recipe, f"unlearn.{name}", recipe.images_of_a_pass(method), network)
    if _pretrains(options):
        pretrain = with_microbatches(pretrain, "pretrain", pretrain.batch_size, network)
    batch, devices = options.sampling.batch_size, jax.device_count()
    sampling = dataclasses.replace(options.sampling, batch_size=-(-batch // devices) * devices)
    if sampling.batch_size != batch:
        change = sampling.batch_size, batch, devices
        log.info("config.sampling.batch_size is %d in place of %d, a multiple of %d devices", *change)
    options = dataclasses.replace(options, methods=methods, sampling=sampling, pretrain=pretrain)
    _check(options)
    return options


def _network(options: Options) -> Mapping[str, Any]:
    """Returns the config of the network that denoises, with diffusers' names; empty if it is in one file or not there."""
    if not options.checkpoint:
        return dataclasses.asdict(options.new_network)
    _, config = network_config(options.checkpoint) or (None, {})
    return config


def with_microbatches(recipe: TrainingOptions, stage: str, images: int, network: Mapping[str, Any]) -> TrainingOptions:
    """Returns `recipe` with a number of microbatches that divides its batches evenly over the devices, and logs it if it changes.

    It is the largest such number up to the recipe's own; on a CPU a larger one, if a device would take more than
    `images_at_once(network)` of the `images` of a pass through the network.
    """
    most = images_at_once(network) if jax.default_backend() == "cpu" else None
    devices, parts = jax.device_count(), recipe.accumulation
    whole = math.gcd(recipe.batch_size, getattr(recipe, "forget_batch_size", 0))
    if whole % devices:
        return recipe
    numbers = [number for number in range(1, whole // devices + 1) if whole // devices % number == 0]
    fitting = max(number for number in numbers if number <= parts)
    if most is not None:
        enough = (number for number in numbers if images <= number * devices * most)
        fitting = max(fitting, next(enough, numbers[-1]))
    if fitting == parts:
        return recipe
    change = stage, fitting, parts, images, devices
    log.info("config.%s.accumulation is %d in place of %d: %d images per pass over %d devices", *change)
    return dataclasses.replace(recipe, accumulation=fitting)


def _pretrains(options: Options) -> bool:
    """Returns whether a model is trained from random weights."""
    return not options.checkpoint or any(name in METHODS and METHODS[name].from_scratch for name in options.method_names)


def _check(options: Options) -> None:
    if _pretrains(options):
        parallel.check_divisible("config.pretrain.batch_size", options.pretrain.batch_size, options.pretrain.accumulation)
    for name in options.method_names:
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
