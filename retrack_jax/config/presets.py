"""`config.sampling.preset`: a sampler and a number of steps by one name. Only the two are recorded, so runs are compared on them.

`quick` is DPM-Solver++, or Euler's method for flows, with the fewest of the measured numbers of calls at which the FID of the
digits' model is at most 2% above that of their config's own sampler (docs/samplers.md has the tables). Others were not measured.
"""

import dataclasses
import logging

from retrack_jax.checkpoints.diffusers_import import read_schedule_config
from retrack_jax.checkpoints.stable_diffusion import pipeline_folder
from retrack_jax.checks import check
from retrack_jax.config.options import Options
from retrack_jax.diffusion.flow import CLASSES as FLOWS
from retrack_jax.diffusion.flow import VELOCITY
from retrack_jax.weights.hub import local_model

log = logging.getLogger(__name__)
DISTILLED = ("LCMScheduler", "TCDScheduler")  # of models that were trained to be sampled in a few steps
# Preset -> (sampler, steps) of schedules with betas and of EDM, and of flows.
_PRESETS = {"quick": (("dpm_solver", 10), ("flow_euler", 15))}


def with_preset(options: Options) -> Options:
    """Returns `options` with the sampler and the steps of `config.sampling.preset` in its place; itself if there is no preset.

    Raises:
      UserError: a sampler or a number of steps that the config has already and that is another; a distilled model.
    """
    sampling = options.sampling
    if not sampling.preset:
        return options
    schedule = schedule_config(options)
    name = schedule.get("_class_name", "")
    check(
        name not in DISTILLED,
        f"config.sampling.preset is {sampling.preset}, which has no sampler for {name}, the schedule of a distilled model; "
        "set config.sampling.sampler and config.sampling.num_steps",
    )
    sampler, num_steps = _PRESETS[sampling.preset][is_flow(schedule)]
    meant = f"config.sampling.preset={sampling.preset} is {sampler} with {num_steps} steps"
    for field, value in (("sampler", sampler), ("num_steps", num_steps)):
        own = getattr(sampling, field)
        check(
            own in (None, value),
            f"{meant}, but config.sampling.{field} is {own!r}; leave out the preset or that field (in Python set it to None)",
        )
    log.info(meant)
    chosen = dataclasses.replace(sampling, preset="", sampler=sampler, num_steps=num_steps)
    return dataclasses.replace(options, sampling=chosen)


def schedule_config(options: Options) -> dict:
    """Returns the schedule's config: the checkpoint's, or that of `config.pipeline`; the config's own if it has none."""
    place = None
    if options.checkpoint:
        place = pipeline_folder(options.checkpoint, options.pipeline) if options.pipeline else local_model(options.checkpoint)
    stored = None if place is None or place.is_file() else read_schedule_config(place)
    return stored or options.schedule.to_config()


def is_flow(schedule: dict) -> bool:
    """Whether the config of a schedule is a flow's."""
    return schedule.get("_class_name") in FLOWS or schedule.get("prediction_type") == VELOCITY
