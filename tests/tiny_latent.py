"""Latent pipelines without prompts at toy size, written by ours: diffusers' LDMPipeline and DiTPipeline as a user brings them.

Pictures are 16 x 16, latents 8 x 8.
"""

import json
import shutil

import jax.numpy as jnp
import numpy as np
from PIL import Image

from retrack_jax.checkpoints import export_diffusers
from retrack_jax.checkpoints.diffusers_import import example_inputs
from retrack_jax.models.dit import DiT
from retrack_jax.models.vae import AutoencoderKL
from retrack_jax.models.vqvae import VQModel
from tests.make_tiny_sd import random_params
from tests.tiny_checkpoint import write_model

SCHEDULE = {
    "_class_name": "DDIMScheduler", "beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear",
    "clip_sample": False, "num_train_timesteps": 1000,
}  # fmt: skip
_CODER = {
    "block_out_channels": (4, 8), "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 2, "latent_channels": 3, "scaling_factor": 0.5,
}  # fmt: skip
CODERS = {
    "vqvae": VQModel.from_config({**_CODER, "num_vq_embeddings": 32}),
    "vae": AutoencoderKL.from_config(_CODER),
}


def write_pipeline(folder, coder="vqvae", **unet):
    """Writes the pipeline into `folder`, in place of what is there, and returns `folder`; `unet` are fields of its UNet."""
    channels = CODERS[coder].latent_width
    write_model(folder, **{"in_channels": channels, "out_channels": channels, **unet})
    module = CODERS[coder]
    export_diffusers(folder / coder, module, random_params(module, 3, jnp.zeros((1, 2, 2, 3))))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULE))
    index = {"_class_name": "LDMPipeline", "scheduler": ["diffusers", "DDIMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    index[coder] = ["diffusers", type(module).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_dit_pipeline(folder, **fields):
    """Writes a DiTPipeline of three labels and a null label, with a learned variance, into `folder`; returns `folder`."""
    write_pipeline(folder, "vae")
    shutil.rmtree(folder / "unet")
    small = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_embeds_ada_norm": 3, "sample_size": 8}
    channels = CODERS["vae"].latent_width
    module = DiT.from_config({"in_channels": channels, "out_channels": 2 * channels, **small, **fields})
    export_diffusers(folder / "transformer", module, random_params(module, 5, *example_inputs(module)))
    index = json.loads((folder / "model_index.json").read_text())
    del index["unet"]
    labels = {"id2label": {"0": "none", "1": "bright", "2": "dark"}}
    index |= {"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"], **labels}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_pictures(folder, count=12, side=16):
    """Writes pictures of four colored quarters, `0.png`, ..., and returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        quarters = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(quarters.repeat(side // 2, 0).repeat(side // 2, 1)).save(folder / f"{i}.png")
    return folder


def flags(tmp_path, **fields) -> list[str]:
    """The command of the README at toy sizes; `fields` are of the config, `__` for a dot."""
    sizes = {
        "checkpoint": tmp_path / "model", "data.dir": tmp_path / "pictures", "targets": "3.png",
        "data.cache_dir": tmp_path / "cache", "unlearn.num_steps": 4, "unlearn.batch_size": 4, "unlearn.accumulation": 1,
        "unlearn.num_neighbors": 3, "sampling.num_images": 6, "sampling.batch_size": 4, "sampling.num_steps": 2,
        "eval.metrics": ("frequency", "nll_bits_per_dim", "forget_loss"), "eval.weights_dir": tmp_path / "weights",
        "eval.frequency_threshold": 1.0,
    }  # fmt: skip
    sizes |= {name.replace("__", "."): value for name, value in fields.items()}
    return [
        "retrack_jax", "--config=configs/custom.py", f"--workdir={tmp_path / 'work'}",
        *(f"--config.{name}={value}" for name, value in sizes.items()),
    ]  # fmt: skip
