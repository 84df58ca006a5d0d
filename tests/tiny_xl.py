"""A tiny Stable Diffusion XL: a pipeline's folder of random weights, every part of the kind that the real ones are."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax.models.clip_text import ClipTextEncoder
from retrack_jax.models.unet2d_condition import UNet2DCondition
from retrack_jax.weights.names import param_shapes
from tests.make_tiny_sd import SCHEDULER, save, write_json
from tests.tiny_sd import PIPELINE

INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": "0.19.0.dev0",
    "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 40,
    "attention_head_dim": (2, 4),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 60,
}


def random_params(module, seed: int, *inputs):
    """Returns parameters that leave no part of the network idle; NumPy draws them, since `init` compiles for half a minute."""
    numbers = np.random.default_rng(seed)

    def draw(path, leaf):
        kernel, scale = (path[-1].key == name for name in ("kernel", "scale"))
        size = np.prod(leaf.shape[:-1]) ** -0.5 if kernel else 0.05
        return jnp.asarray(scale + size * numbers.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, param_shapes(module, *inputs))


def write_xl(folder: Path) -> Path:
    """Writes the pipeline, float16, its text encoders as fp16 variants; returns `folder`."""
    for part in ("vae", "tokenizer"):
        shutil.copytree(PIPELINE / part, folder / part)
    vae = json.loads((folder / "vae" / "config.json").read_text())
    write_json(folder / "vae" / "config.json", vae | {"scaling_factor": 0.13025, "force_upcast": True})
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    special = folder / "tokenizer_2" / "special_tokens_map.json"
    special.write_text(special.read_text().replace('"pad_token": "<|endoftext|>"', '"pad_token": "!"'))
    write_json(folder / "model_index.json", INDEX)
    own = {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "timestep_spacing": "leading"}
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER | own | {"use_karras_sigmas": False})
    (folder / "LICENSE").write_text("The license of the source.\n")

    unet = UNet2DCondition(**UNET)
    inputs = jnp.zeros((1, 8, 8, 4)), jnp.zeros((1,), jnp.int32), unet.smallest_condition
    save(folder / "unet", unet.to_config(), random_params(unet, 1, *inputs), "diffusion_pytorch_model")
    first = json.loads((PIPELINE / "text_encoder" / "config.json").read_text()) | {"projection_dim": 16, "eos_token_id": 2}
    second = {**first, "architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu", "hidden_size": 24}
    second |= {"num_hidden_layers": 3, "projection_dim": 12, "pad_token_id": 0}
    for number, (part, config, width) in enumerate((("text_encoder", first, None), ("text_encoder_2", second, 12))):
        module = ClipTextEncoder.from_config(config, projection_dim=width)
        params = random_params(module, 3 + number, jnp.zeros((1, 77), jnp.int32))
        prefix = "" if width else "text_model."  # as transformers 5 and 4 write names
        save(folder / part, config, params, "model.fp16", prefix)
    return folder
