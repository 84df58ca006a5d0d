"""What a config of Stable Diffusion must hold, told before anything is loaded."""

from ml_collections import ConfigDict

from retrack_jax.checks import check, check_choice, check_int, check_number
from retrack_jax.config.build import DTYPES
from retrack_jax.evaluate.prompts import CLASSIFIERS, METRIC_NAMES
from retrack_jax.sampling import SAMPLERS

EXPORTS = ("pipeline", "unet", "none")
# Fields of config.data for other sources of images, with the values that change nothing.
_OF_OTHER_SOURCES = {"format": "", "copies": 0, "channels": 0, "held_out": 0.0, "exclude": "", "skip_corrupt": False}


def check_text_to_image(config: ConfigDict) -> None:
    """Raises `UserError`, naming the field, for values that no run of this kind can use."""
    check(
        config.method != "retrain",
        "Stable Diffusion cannot be pretrained or retrained here; choose another method than retrain",
    )
    check(
        bool(config.checkpoint),
        "config.checkpoint is empty; set it to a Stable Diffusion folder (see docs/stable_diffusion.md)",
    )
    check(
        bool(config.data.dir),
        "config.data.dir is empty; set it to the folder that holds one folder per concept and the prompts",
    )
    for name, default in _OF_OTHER_SOURCES.items():
        value = config.data[name]
        check(value == default, f"config.data.{name} is {value!r}, which concepts have no use for; leave it at {default!r}")
    check_choice("config.export", config.export, EXPORTS)
    check_choice("config.compute.param_dtype", config.compute.param_dtype, DTYPES)
    check_choice("config.eval.classifier", config.eval.classifier, CLASSIFIERS)
    check_choice("config.sampling.sampler", config.sampling.sampler, SAMPLERS)
    check_number("config.sampling.guidance_scale", config.sampling.guidance_scale, 0.0)
    check_int("config.data.encode_batch_size", config.data.encode_batch_size)
    check_int("config.data.resolution", config.data.resolution)
    check_int("config.data.latent_seed", config.data.latent_seed, minimum=0)
    for name in config.eval.metrics:
        check_choice("config.eval.metrics", name, METRIC_NAMES)
