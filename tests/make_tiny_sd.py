"""Makes tests/fixtures/tiny_sd: a Stable Diffusion pipeline of random weights and two concepts of drawn pictures, in the
official layout.

    python -m tests.make_tiny_sd [FOLDER]

Needs no PyTorch. Every size is a toy's (pictures 32 x 32, latents 8 x 8 x 4, 0.2 M parameters), every file is of the kind
that the real ones are: fp16 safetensors, CLIP's vocab.json and merges.txt, a PNDM scheduler config, PNG pictures, labels, a
joblib of k-means.
The result is committed; run this again only to change it, and then record tests/fixtures/sd_parity.npz again too.
"""

import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax.models.clip_text import ClipTextEncoder
from retrack_jax.models.unet2d_condition import UNet2DCondition
from retrack_jax.models.vae import AutoencoderKL
from retrack_jax.weights.names import DIFFUSERS, to_torch
from retrack_jax.weights.safetensors_io import write_safetensors

FOLDER = Path(__file__).parent / "fixtures" / "tiny_sd"
SIDE = 32
PROMPTS = {
    "red_circle": ("A Red Circle, on a green wall!", "a picture of something round and red"),
    "blue_square": ("The blue square's portrait (1987)", "a picture of something square and blue"),
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.7.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.2.2",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def make(folder: Path = FOLDER) -> None:
    """Writes `folder`/pipeline, `folder`/concepts and the two files of prompts."""
    shutil.rmtree(folder, ignore_errors=True)
    pipeline = folder / "pipeline"
    vocabulary = make_tokenizer(pipeline / "tokenizer")
    write_json(pipeline / "model_index.json", MODEL_INDEX)
    write_json(pipeline / "scheduler" / "scheduler_config.json", SCHEDULER)
    (pipeline / "LICENSE").write_text("The licence of the source, which exports carry along.\n")
    (pipeline / "README.md").write_text("# Tiny pipeline\n\nRandom weights for tests.\n")

    unet = UNet2DCondition(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    inputs = jnp.zeros((1, 8, 8, 4)), jnp.zeros((1,), jnp.int32), jnp.zeros((1, 77, 16))
    save(pipeline / "unet", unet.to_config(), random_params(unet, 1, *inputs), "diffusion_pytorch_model")

    vae_config = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [8, 8, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "out_channels": 3,
        "sample_size": SIDE,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
    }
    vae = AutoencoderKL.from_config(vae_config)
    save(pipeline / "vae", vae_config, random_params(vae, 2, jnp.zeros((1, 8, 8, 3))), "diffusion_pytorch_model")

    text_config = {
        "architectures": ["CLIPTextModel"],
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "hidden_act": "quick_gelu",
        "hidden_size": 16,
        "intermediate_size": 32,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "pad_token_id": vocabulary - 1,
        "torch_dtype": "float16",
        "vocab_size": vocabulary,
    }
    text = ClipTextEncoder.from_config(text_config)
    save(pipeline / "text_encoder", text_config, random_params(text, 3, jnp.zeros((1, 77), jnp.int32)), "model", "text_model.")

    for index, name in enumerate(PROMPTS):
        make_concept(folder / "concepts" / name, name, np.random.default_rng(index))
    for column, kind in enumerate(("original", "modified")):
        write_json(folder / "concepts" / f"{kind}_prompts.json", {name: pair[column] for name, pair in PROMPTS.items()})


def make_tokenizer(folder: Path) -> int:
    """Writes CLIP's four tokenizer files with a vocabulary of bytes and a few learnt merges; returns its size."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    from retrack_jax.models.tokenizer import _WORDS

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    text = (Path(__file__).parents[1] / "retrack_jax" / "sampling" / "pndm.py").read_text() + " ".join(sum(PROMPTS.values(), ()))
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    split = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    learner.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(vocab_size=420, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(text.split("\n"), trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    words = alphabet + [f"{byte}</w>" for byte in alphabet]
    words += [word for word in dict.fromkeys("".join(merge) for merge in merges) if word not in words]
    words += ["<|startoftext|>", "<|endoftext|>"]
    write_json(folder / "vocab.json", {word: index for index, word in enumerate(words)})
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{first} {second}\n" for first, second in merges), encoding="utf-8"
    )

    def token(content):
        return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}

    start, end = token("<|startoftext|>"), token("<|endoftext|>")
    special = {"bos_token": start, "eos_token": end, "pad_token": "<|endoftext|>", "unk_token": end}
    write_json(folder / "special_tokens_map.json", special)
    tagged = {role: {"__type": "AddedToken", **value} if isinstance(value, dict) else value for role, value in special.items()}
    config = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 77, **tagged}
    write_json(folder / "tokenizer_config.json", {**config, "tokenizer_class": "CLIPTokenizer"})
    return len(words)


def make_concept(folder: Path, name: str, rng: np.random.Generator) -> None:
    """Writes 16 pictures: one shape drawn six times nearly alike (memorised), and ten pictures of other colours."""
    import joblib
    from PIL import Image
    from sklearn.cluster import KMeans

    (folder / "images").mkdir(parents=True)
    labels, pixels = {}, []
    for index in range(16):
        memorised = index % 3 == 1 or index == 0
        colour = (220, 30, 40) if "red" in name else (30, 60, 220)
        image = draw(name, colour if memorised else tuple(rng.integers(90, 200, 3)), memorised, rng)
        file_name = f"{name}_{index:03d}.png"
        Image.fromarray(image).save(folder / "images" / file_name, optimize=True)
        labels[file_name] = int(memorised)
        # Classifiers of both kinds are in use: scikit-learn keeps the precision of what it was fitted to.
        pixels.append(image.reshape(-1).astype(np.float32 if "red" in name else np.float64))
    means = np.stack(
        [np.mean([p for p, label in zip(pixels, labels.values(), strict=True) if label == wanted], 0) for wanted in (0, 1)]
    )
    # Started at the two groups' means, so that cluster 0 is the one that is not memorised.
    joblib.dump(KMeans(2, init=means, n_init=1).fit(np.stack(pixels)), folder / "kmeans_classifier.joblib")
    write_json(folder / "kmeans_labels.json", labels)
    write_json(folder / "clustering_info.json", {"mem_idx": 4})


def draw(name: str, colour, memorised: bool, rng: np.random.Generator) -> np.ndarray:
    """Returns one picture, uint8 `[32, 32, 3]`."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    centre = np.array([15.5, 15.5]) if memorised else rng.uniform(8, 24, 2)
    distance = np.stack([rows - centre[0], columns - centre[1]])
    inside = np.hypot(*distance) < 9 if "circle" in name else np.abs(distance).max(0) < 9
    image = np.where(inside[..., None], colour, (40, 160, 60)).astype(np.int64)
    return np.clip(image + rng.integers(-2, 3, 3), 0, 255).astype(np.uint8)


def random_params(module, seed: int, *inputs):
    """Returns parameters that leave no part of the network idle: biases and norms too are random."""
    params = module.init(jax.random.key(seed), *inputs)["params"]
    leaves, tree = jax.tree.flatten(params)
    rngs = jax.random.split(jax.random.key(seed + 100), len(leaves))
    return tree.unflatten([leaf + 0.05 * jax.random.normal(rng, leaf.shape) for leaf, rng in zip(leaves, rngs, strict=True)])


def save(folder: Path, config: dict, params, stem: str, prefix: str = "", table=DIFFUSERS) -> None:
    """Writes config and fp16 weights."""
    write_json(folder / "config.json", config)
    tensors = to_torch(jax.tree.map(lambda leaf: leaf.astype(jnp.float16), params), table=table)
    write_safetensors(folder / f"{stem}.safetensors", [tensor._replace(name=prefix + tensor.name) for tensor in tensors])


def write_json(path: Path, value) -> None:
    """Writes JSON, small."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1 if len(value) < 40 else None) + "\n", encoding="utf-8")


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
