"""A tiny Stable Diffusion 3, with or without T5: a folder of random weights, every part of the kind that the real ones are."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp

from retrack_jax.checkpoints.diffusers_import import example_inputs
from retrack_jax.checkpoints.text_encoders import T5_TABLE
from retrack_jax.models.clip_text import ClipTextEncoder
from retrack_jax.models.mmdit import MMDiT
from retrack_jax.models.t5_text import T5Encoder
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


T5 = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "feed_forward_proj": "gated-gelu",
    "d_model": TRANSFORMER["joint_attention_dim"],
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 3,
    "num_heads": 4,
    "vocab_size": 128,
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 40,
    "layer_norm_epsilon": 1e-6,
}


def add_t5(folder: Path) -> Path:
    """Adds a T5 of random weights, float16, and its tokenizer to the pipeline in `folder`; returns `folder`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    module = T5Encoder.from_config(T5)
    params = random_params(module, 5, jnp.zeros((1, 8), jnp.int32))
    save(folder / "text_encoder_3", T5, params, "model", table=T5_TABLE)
    words = [" red", " green", " circle", " square", " a", " on", " ", *map(chr, range(33, 123))]
    scored = [(word.replace(" ", "\u2581"), -len(word) / 9) for word in words]
    backend = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *scored], unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    backend.add_special_tokens(["<pad>", "</s>", "<unk>"])
    (folder / "tokenizer_3").mkdir()
    backend.save(str(folder / "tokenizer_3" / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "extra_ids": 0}
    write_json(folder / "tokenizer_3" / "tokenizer_config.json", {"tokenizer_class": "T5TokenizerFast", **special})
    parts = {"text_encoder_3": ["transformers", "T5EncoderModel"], "tokenizer_3": ["transformers", "T5TokenizerFast"]}
    write_json(folder / "model_index.json", INDEX | parts)
    return folder
