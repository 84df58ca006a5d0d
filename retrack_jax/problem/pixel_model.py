"""The network of an experiment in pixels: a checkpoint's, or a new one of the config's shape."""

import logging

from ml_collections import ConfigDict

from retrack_jax.checks import check
from retrack_jax.config import build
from retrack_jax.data.dataset import ImageSet
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.models.unet2d import UNet2D
from retrack_jax.notation import PyTree

log = logging.getLogger(__name__)


def load_unet(config: ConfigDict) -> tuple[UNet2D, PyTree | None, Schedule]:
    """Returns the module, a checkpoint's parameters on the host (None: to be trained here), and the noise schedule.

    Raises:
      UserError: a checkpoint that is not there, not whole or not supported; fields of `config.model` that make no network.
    """
    own = {"dtype": build.DTYPES[config.compute.dtype], "remat": config.compute.remat}
    if not config.checkpoint:
        return UNet2D.from_config(config.model.to_dict(), **own), None, build.schedule_from(config, None)
    from retrack_jax.checkpoints import import_diffusers
    from retrack_jax.checkpoints.diffusers_import import read_schedule_config

    module, params = import_diffusers(config.checkpoint)
    schedule = read_schedule_config(config.checkpoint)
    if schedule is None:
        log.warning("no scheduler_config.json in %s; config.schedule is taken as its noise schedule", config.checkpoint)
    return module.clone(**own), params, build.schedule_from(config, schedule)


def check_fits(module: UNet2D, images: ImageSet) -> None:
    """Raises `UserError` where the network cannot take the images, or makes another number of channels than they have."""
    height, width, channels = images.images.shape[1:]
    check(
        channels == module.in_channels,
        f"the images of {images.name} have {channels} channels and the network takes {module.in_channels}; "
        "choose the data and the checkpoint that belong together",
    )
    check(
        channels == module.out_channels,
        f"the network makes {module.out_channels} channels of {channels}; one that predicts a variance beside the noise is not "
        "supported",
    )
    factor = 2 ** (len(module.block_out_channels) - 1)
    check(
        height % factor == 0 and width % factor == 0,
        f"the images of {images.name} are {height}x{width}; the network needs sides that {factor} divides; set "
        "config.data.resolution",
    )
