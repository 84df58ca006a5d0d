"""diffusers' `scheduler_config.json`: which of its keys a schedule is made of, and what is written back.

Training needs the betas and the prediction type, or for a flow the shift (flow.py), or EDM's sigmas (edm.py). Every scheduler of
diffusers that defines betas gives these. Samples are drawn by our own samplers (sampling/), so options of the others' samplers
change nothing here. A config that holds such options is written back as it was read, so that diffusers makes the same scheduler
of an export.
"""

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from retrack_jax.checks import UserError, suggestion
from retrack_jax.diffusion import edm, flow

log = logging.getLogger(__name__)

DEFAULTS = {
    "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "trained_betas": None,
    "prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 0, "rescale_betas_zero_snr": False,
    "clip_sample": True, "clip_sample_range": 1.0, "variance_type": "fixed_small",
    "set_alpha_to_one": True, "skip_prk_steps": False, **edm.SETTINGS,
    "solver_order": 2, "solver_type": "midpoint", "lower_order_final": True, "euler_at_final": False, "final_sigmas_type": "zero",
    "shift": 1.0,
}  # fmt: skip
_COMMON = tuple(DEFAULTS)[:8]
_ZERO_SNR = "rescale_betas_zero_snr"

# The classes whose samplers are ours too, each with the keys that it has, those with betas in addition to `_COMMON`.
OWN = {
    "DDPMScheduler": (_ZERO_SNR, "clip_sample", "clip_sample_range", "variance_type"),
    "DDIMScheduler": (_ZERO_SNR, "clip_sample", "clip_sample_range", "set_alpha_to_one"),
    "PNDMScheduler": ("set_alpha_to_one", "skip_prk_steps"),
    "DPMSolverMultistepScheduler": (_ZERO_SNR, *tuple(DEFAULTS)[-6:-1]),
    **edm.CLASSES,
}
# Where a class differs from DEFAULTS. Most never clip, so a schedule from their files does not clip with our other samplers
# either, unless the file has the key.
_UNCLIPPED = {"timestep_spacing": "linspace", "clip_sample": False}
_NARROW = {"beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {},
    "DDIMScheduler": {},
    "PNDMScheduler": {"set_alpha_to_one": False, "clip_sample": False},
    "DPMSolverMultistepScheduler": _UNCLIPPED,
    **dict.fromkeys(flow.CLASSES, {"prediction_type": flow.VELOCITY, "clip_sample": False}),
    **dict.fromkeys(edm.CLASSES, {"clip_sample": False}),
    # The others are read for their betas alone.
    **dict.fromkeys(("DDIMInverseScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler", "RePaintScheduler"), {}),
    **dict.fromkeys(
        ("DEISMultistepScheduler", "DPMSolverMultistepInverseScheduler", "DPMSolverSinglestepScheduler", "EulerDiscreteScheduler",
         "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler", "SASolverScheduler", "UniPCMultistepScheduler"), _UNCLIPPED,
    ),
    **dict.fromkeys(
        ("DPMSolverSDEScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler"),
        {**_NARROW, "timestep_spacing": "linspace"},
    ),
    **dict.fromkeys(("LCMScheduler", "TCDScheduler"), {**_NARROW, "beta_schedule": "scaled_linear"}),
}  # fmt: skip
# These classes put 2^-24, the least float16, in place of alpha_bar_{T-1} = 0, because they divide by it.
FLOOR = 2.0**-24
FLOORED = (
    "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"
)  # fmt: skip

# Keys without effect: they belong to options that are off or refused, or to early versions.
_HARMLESS = {
    "dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type", "tensor_format", "timestep_values"
}  # fmt: skip
# Options of diffusers' samplers that ours do not have, with the value that needs none.
_OF_SAMPLERS = {
    "thresholding": False, "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
    "use_lu_lambdas": False, "algorithm_type": "dpmsolver++", "lambda_min_clipped": -math.inf,
}  # fmt: skip
_OF_FLOWS = ("use_flow_sigmas", "use_dynamic_shifting")
# What other schedulers read. diffusers keeps such options when it makes one scheduler from another's config, and saves them.
_OF_OTHERS = {
    "interpolation_type", "timestep_type", "noise_sampler_seed",  # Euler's; the SDE solver's
    "predict_x0", "disable_corrector", "solver_p", "shift_terminal",  # UniPC
    "predictor_order", "corrector_order", "tau_func",  # the SA solver
    "original_inference_steps", "timestep_scaling",  # LCM, TCD
    "eta",  # RePaint
}  # fmt: skip
_OF_UNIPC = ("bh1", "bh2", "logrho")  # solver types, for which DPM-Solver takes its default
# What a schedule takes of the file of any class: another scheduler made from it keeps that.
_KEPT = {*_COMMON, "clip_sample", "clip_sample_range", "set_alpha_to_one", "final_sigmas_type"}


def read(config: Mapping[str, Any] | None) -> tuple[str, dict[str, Any], str]:
    """Returns (class name, settings for `Schedule.create`, the config as JSON if it is to be written back as it is, else "").

    `_class_name` is `DDPMScheduler` if absent; other keys that start with an underscore are ignored. Null means absent, or false.

    Raises:
      UserError: a scheduler of another kind (neither betas, a flow nor EDM), an option of flows with betas, an unknown key; or
        None, the config of a model that came without one.
    """
    if config is None:
        raise UserError("there is no scheduler_config.json to make a schedule of; use Schedule.create(...) with its settings")
    given = {key: value for key, value in config.items() if value is not None}
    name = given.get("_class_name", "DDPMScheduler")
    _check_class(name)
    if name in flow.CLASSES:
        return name, flow.read(name, given), ""
    given |= {key: False for key, value in config.items() if value is None and isinstance(DEFAULTS.get(key), bool)}
    settings, ignored, of_others = {}, [], False
    for key, value in given.items():
        if key == "timestep_type" and value != "discrete":
            raise UserError(f"the scheduler config sets {key} to {value!r}: its network is not given timesteps; not supported")
        elif key in _OF_OTHERS or (key == "solver_type" and value in _OF_UNIPC):
            of_others = True
        elif key == "predict_epsilon":  # diffusers before 0.9
            settings.setdefault("prediction_type", "epsilon" if value else "sample")
        elif key in _OF_FLOWS and value:
            raise UserError(f"the scheduler config sets {key} to {value!r}: it is for flows, which are read of {flow.EULER}")
        elif key in edm.SETTINGS and name in OWN and name not in edm.CLASSES:
            raise UserError(f"the scheduler config sets {key}, which is for EDM, and {name} does not read it; give that class")
        elif key == "solver_order" and name in OWN and value == 3:
            ignored.append("solver_order=3")
        elif key in _OF_SAMPLERS and value not in (_OF_SAMPLERS[key], str(_OF_SAMPLERS[key])):
            ignored.append(f"{key}={value!r}")
        elif key == _ZERO_SNR and value and key not in OWN.get(name, (key,)):
            raise UserError(
                f"the scheduler config sets {key}, which {name} does not have, so that diffusers ignores it; if the network was "
                "trained so, make the _class_name DDIMScheduler, else take it out"
            )
        elif key in _KEPT or key == _ZERO_SNR or (key in DEFAULTS and name in OWN):
            settings[key] = value
        elif name in OWN and not (key.startswith("_") or key in _HARMLESS or key in _OF_SAMPLERS or key in _OF_FLOWS):
            known = (*DEFAULTS, *_HARMLESS, *_OF_SAMPLERS, *_OF_FLOWS)
            raise UserError(f"the scheduler config has the unknown key {key!r}{suggestion(key, known)}")
    if name in OWN and not (ignored or of_others):
        return name, settings, ""
    if name not in OWN or ignored:
        what = name if name not in OWN else f"{', '.join(ignored)} of {name}"
        log.info("%s: noise levels and prediction type are taken from it; samples are drawn by config.sampling.sampler", what)
    # JSON has no infinity; the only infinite option is a default of diffusers.
    finite = {key: value for key, value in config.items() if not (isinstance(value, float) and math.isinf(value))}
    return name, settings, json.dumps(finite, default=lambda value: np.asarray(value).tolist())


def write(class_name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `scheduler_config.json` of one of `OWN`, or of a flow, which `read` reads back as `values`.

    What the class does not have is written too if it differs from the default: another scheduler may be made from the file.
    """
    config = {"_class_name": class_name}
    if class_name in flow.CLASSES:
        return config | {name: values[name] for name in ("num_train_timesteps", "shift")}
    if class_name in edm.CLASSES:
        return config | {name: values[name] for name in edm.CLASSES[class_name]}
    defaults = DEFAULTS | CLASS_DEFAULTS[class_name]
    for name, value in values.items():
        own = (
            name in (*_COMMON, *OWN.get(class_name, ()), "clip_sample") and name != _ZERO_SNR
        )  # which is newer than many a reader
        if own or value != defaults[name]:
            config[name] = list(value) if isinstance(value, tuple) else value
    return config


def _check_class(name: Any) -> None:
    """Raises `UserError` for a scheduler that is not read."""
    if isinstance(name, str) and name in CLASS_DEFAULTS:
        return
    is_flow = "Flow" in str(name)
    near = "" if is_flow else suggestion(name, CLASS_DEFAULTS)
    why = "is for flows" if is_flow else "is none that is known to define them"
    raise UserError(
        f"the scheduler config's _class_name is {name!r}: training needs betas, and it {why}; give the scheduler_config.json "
        f"that the model was trained with, of a class such as {', '.join(OWN)}{near}"
    )
