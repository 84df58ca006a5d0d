"""A tiny Stable Diffusion 3 without T5: a pipeline's folder of random weights, every part of the kind that the real ones are."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp

from retrack_jax.checkpoints.diffusers_import import example_inputs
from retrack_jax.models.clip_text import ClipTextEncoder
from retrack_jax.models.mmdit import MMDiT
from retrack_jax.models.vae import AutoencoderKL
from tests.make_tiny_sd import save, write_json
from tests.tiny_sd import PIPELINE
from tests.tiny_xl import random_params

CLIP, NONE = ["transformers", "CLIPTextModelWithProjection"], [None, None]
INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "_diffusers_version": "0.29.0.dev0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": CLIP,
    "text_encoder_2": CLIP,
    "text_encoder_3": NONE,
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": NONE,
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
TRANSFORMER = {
    "sample_size": 8,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_projection_dim": 16,
    "joint_attention_dim": 48,
    "pooled_projection_dim": 28,
    "pos_embed_max_size": 12,
}


def write_sd3(folder: Path, **options) -> Path:
    """Writes the pipeline, float16; `options` are of the transformer. Returns `folder`."""
    for part in ("tokenizer", "tokenizer_2"):
        shutil.copytree(PIPELINE / "tokenizer", folder / part)
    special = folder / "tokenizer_2" / "special_tokens_map.json"
    special.write_text(special.read_text().replace('"pad_token": "<|endoftext|>"', '"pad_token": "!"'))
    write_json(folder / "model_index.json", INDEX)
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    (folder / "LICENSE").write_text("The license of the source.\n")

    transformer = MMDiT.from_config({**TRANSFORMER, **options})
    params = random_params(transformer, 1, *example_inputs(transformer))
    save(folder / "transformer", transformer.to_config(), params, "diffusion_pytorch_model")
    vae_config = json.loads((PIPELINE / "vae" / "config.json").read_text())
    vae_config |= {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "force_upcast": True}
    vae_config |= {"use_quant_conv": False, "use_post_quant_conv": False}
    vae = AutoencoderKL.from_config(vae_config)
    save(folder / "vae", vae_config, random_params(vae, 2, jnp.zeros((1, 8, 8, 3))), "diffusion_pytorch_model")
    first = json.loads((PIPELINE / "text_encoder" / "config.json").read_text()) | {"projection_dim": 16, "eos_token_id": 2}
    first |= {"architectures": CLIP[1:]}
    second = {**first, "hidden_act": "gelu", "hidden_size": 24, "num_hidden_layers": 3, "projection_dim": 12, "pad_token_id": 0}
    for number, (part, config) in enumerate((("text_encoder", first), ("text_encoder_2", second))):
        module = ClipTextEncoder.from_config(config, projection_dim=config["projection_dim"])
        save(folder / part, config, random_params(module, 3 + number, jnp.zeros((1, 77), jnp.int32)), "model")
    return folder
