"""Which kind of experiment a config describes: images in pixels, or prompts of a text-to-image model."""

from ml_collections import ConfigDict

from retrack_jax.problem.experiment import Experiment
from retrack_jax.problem.pixels import PixelExperiment, check_pixel_config


def check_experiment(config: ConfigDict) -> None:
    """Raises `UserError` for values that the kind of experiment that the config describes cannot use; nothing is loaded."""
    if config.data.source == "concepts":
        from retrack_jax.config.text_to_image import check_text_to_image

        check_text_to_image(config)
    else:
        check_pixel_config(config)


def build_experiment(config: ConfigDict) -> Experiment:
    """Returns the experiment that the config describes."""
    if config.data.source == "concepts":
        from retrack_jax.problem.text_to_image import TextToImageExperiment

        return TextToImageExperiment(config)
    return PixelExperiment(config)
