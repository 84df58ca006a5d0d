"""A diffusers pipeline of pixels at toy size, written by ours: what a user brings to configs/custom.py."""

import shutil

import jax

from retrack_jax.checkpoints import export_diffusers
from retrack_jax.checkpoints.diffusers_import import example_inputs
from retrack_jax.models.unet2d import UNet2D


def write_model(folder, seed=0, sample_size=8, **options):
    """Writes the pipeline into `folder`, in place of what is there, and returns `folder`."""
    blocks = {"block_out_channels": (4, 4), "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    small = {"layers_per_block": 1, "norm_num_groups": 2, "attention_head_dim": 4}
    module = UNet2D.from_config({"sample_size": sample_size, **blocks, **small, **options})
    params = jax.jit(module.init)(jax.random.key(seed), *example_inputs(module))["params"]
    shutil.rmtree(folder, ignore_errors=True)
    export_diffusers(folder / "unet", module, params)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    return folder
