"""The autoencoder of a latent model without prompts: diffusers' `LDMPipeline` and `DiTPipeline`.

    model_index.json  unet/ (or transformer/)  vqvae/ (or vae/)  scheduler/

It is a VQModel or an AutoencoderKL. A network without one next to it is taken for a model of pixels.
"""

import logging
from pathlib import Path

import jax
import jax.numpy as jnp

from retrack_jax.checkpoints.diffusers_import import load_params
from retrack_jax.checks import check, check_choice
from retrack_jax.files import json_digest
from retrack_jax.models.vae import Autoencoder, AutoencoderKL
from retrack_jax.models.vqvae import VQModel
from retrack_jax.notation import PyTree
from retrack_jax.weights.folder import read_config, weights_digest

# By diffusers' `_class_name`. A new autoencoder is one entry here and one module.
AUTOENCODERS: dict[str, type[Autoencoder]] = {"VQModel": VQModel, "AutoencoderKL": AutoencoderKL}
_log = logging.getLogger(__name__)


def read_autoencoder(folder: Path, dtype=jnp.float32) -> Autoencoder:
    """Returns the module of the `config.json` in `folder`. Raises `UserError`, naming the field, if it is not supported."""
    config = read_config(folder)
    name = config.get("_class_name")
    check_choice(f"_class_name in {folder / 'config.json'}", name, AUTOENCODERS)
    return AUTOENCODERS[name].from_config(config, dtype=dtype)


def load_autoencoder(folder: Path, dtype=jnp.float32) -> tuple[Autoencoder, PyTree, str]:
    """Returns the module in `folder`, its parameters, and a digest of both and of `dtype`, which keys caches of latents.

    Raises:
      UserError: as `read_autoencoder`, or the weights are missing or do not fit.
    """
    module, config = read_autoencoder(folder, dtype), read_config(folder)
    shift = getattr(module, "shift_factor", None)
    check(shift is None, f"{folder} has a shift_factor, {shift}, which diffusers heeds with Stable Diffusion 3 alone; remove it")
    normalized = getattr(module, "latents_mean", None) is not None
    check(not normalized, f"{folder} has a latents_mean, which diffusers heeds with Stable Diffusion XL alone; remove it")
    if "scaling_factor" not in config:
        factor = module.scaling_factor
        _log.info("%s has no scaling_factor; the factor of its latents is taken to be %s", folder / "config.json", factor)
    pixels = jnp.zeros((1, module.downscale, module.downscale, module.in_channels))
    params = jax.device_put(load_params(module, folder, pixels))
    return module, params, json_digest([config, weights_digest(folder), str(jnp.dtype(dtype))])
