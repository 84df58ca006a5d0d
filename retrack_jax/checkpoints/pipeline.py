"""A whole Stable Diffusion folder, in and out: UNet, VAE, text encoder, tokenizer and noise schedule as diffusers lays
them out.

    model_index.json  unet/  vae/  text_encoder/  tokenizer/  scheduler/     and, carried along unread, safety_checker/
    feature_extractor/

Stable Diffusion 1.x and 2.x are supported. Weights in float16 are read into float32.
"""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax.checkpoints.diffusers_export import check_replaceable, export_diffusers, licences, model_card, move_into_place
from retrack_jax.checkpoints.diffusers_import import load_params, open_weights, read_schedule_config
from retrack_jax.checkpoints.names import RenameTable, from_torch
from retrack_jax.checks import UserError, check
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.files import file_digest, json_digest, read_json, write_bytes, write_json, write_text
from retrack_jax.models.clip_text import ClipTextEncoder
from retrack_jax.models.tokenizer import ClipTokenizer, load_tokenizer
from retrack_jax.models.unet2d_condition import UNet2DCondition
from retrack_jax.models.vae import AutoencoderKL
from retrack_jax.types import Array, PyTree

_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_PREFIX = "text_model."
# A buffer of position numbers that old versions of transformers saved.
_TEXT_TABLE = RenameTable(aliases=(), ignored=(r"embeddings\.position_ids",))
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Pipeline:
    """The parts of a text-to-image model. Modules are Linen modules; parameters are trees of arrays.

    Attributes:
      path: the folder they came from.
      vae_digest: SHA-256 over the VAE's config and weights file, which keys caches of latents.
    """

    path: Path
    unet: UNet2DCondition
    unet_params: PyTree
    vae: AutoencoderKL
    vae_params: PyTree
    text_encoder: ClipTextEncoder
    text_params: PyTree
    tokenizer: ClipTokenizer
    schedule: Schedule
    vae_digest: str

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that the UNet denoises."""
        return self.vae.latent_channels

    def encode_pixels(self, x_BHWC: Array) -> tuple[Array, Array]:
        """Returns mean and std of the scaled latents of images in [-1, 1]; see `AutoencoderKL.encode`."""
        return self.vae.apply({"params": self.vae_params}, x_BHWC, method="encode")


def load_pipeline(path, *, dtype=jnp.float32, param_dtype=jnp.float32, remat: bool = False) -> Pipeline:
    """Returns the Stable Diffusion pipeline in the folder `path`.

    Args:
      path: the folder, as diffusers saves it; weights as safetensors or `.bin`, float32 or float16.
      dtype: what the networks compute in.
      param_dtype: what the UNet's parameters are kept in. bfloat16 halves them (3.4 to 1.7 GB for Stable Diffusion 1.x),
        for sampling: an update smaller than 1/256 of a weight is lost in it, so train in float32.
      remat: whether the UNet computes activations again in the backward pass.

    Raises:
      UserError: a part is missing or does not fit the others, or the folder is of another kind of model (Stable Diffusion
        XL, say).
    """
    folder = Path(path).expanduser()
    check_pipeline(folder)
    unet = UNet2DCondition.from_config(_config(folder / "unet"), dtype=dtype, remat=remat)
    vae = AutoencoderKL.from_config(_config(folder / "vae"), dtype=dtype)
    text_encoder = ClipTextEncoder.from_config(_config(folder / "text_encoder"), dtype=dtype)
    tokenizer = load_tokenizer(folder / "tokenizer")
    _check_fit(folder, unet, vae, text_encoder, tokenizer)
    schedule = Schedule.from_config(read_schedule_config(folder))

    side = 2 ** (len(unet.block_out_channels) - 1)
    prompt = jnp.zeros((1, 1, unet.cross_attention_dim))
    unet_inputs = jnp.zeros((1, side, side, unet.in_channels)), jnp.zeros((1,), jnp.int32), prompt
    unet_params = load_params(unet, folder / "unet", *unet_inputs)
    if param_dtype != jnp.float32:
        unet_params = jax.tree.map(lambda leaf: leaf.astype(param_dtype), unet_params)
    return Pipeline(
        path=folder,
        unet=unet,
        unet_params=unet_params,
        vae=vae,
        vae_params=load_params(vae, folder / "vae", jnp.zeros((1, vae.downscale, vae.downscale, vae.in_channels))),
        text_encoder=text_encoder,
        text_params=_load_text(text_encoder, folder / "text_encoder"),
        tokenizer=tokenizer,
        schedule=schedule,
        vae_digest=json_digest(
            [_config(folder / "vae"), file_digest(open_weights(folder / "vae")[0]), str(jnp.dtype(dtype))]
        ),
    )


def check_pipeline(folder) -> None:
    """Raises `UserError` unless `folder` has every part of a Stable Diffusion 1.x or 2.x pipeline; names what it is instead."""
    folder = Path(folder).expanduser()
    check(
        folder.is_dir(),
        f"no folder {folder}; set config.checkpoint to a Stable Diffusion folder (see docs/stable_diffusion.md)",
    )
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    name = index.get("_class_name", "StableDiffusionPipeline")
    if "XL" in name or (folder / "text_encoder_2").is_dir():
        raise UserError(
            f"{folder} holds Stable Diffusion XL, which is not supported; give a Stable Diffusion 1.x or 2.x folder"
        )
    check(
        name == "StableDiffusionPipeline",
        f"{folder} holds a {name}, which is not supported; give a Stable Diffusion 1.x or 2.x folder",
    )
    missing = [part for part in _PARTS if not (folder / part).is_dir()]
    if missing:
        raise UserError(
            f"{folder} has no {', '.join(missing)} folder; download the whole pipeline (see docs/stable_diffusion.md)"
        )


def prompt_embeddings(pipeline: Pipeline, prompts: Sequence[str]) -> Array:
    """Returns float32 `[P, N, D]`: the text encoder's hidden states after its final norm, padding included, N = 77 for CLIP.

    A prompt longer than 75 tokens is cut, with a warning that says how long it is.
    """
    for prompt in prompts:
        if (count := pipeline.tokenizer.count(prompt)) > pipeline.tokenizer.length:
            _log.warning("a prompt of %d tokens is cut to %d: %.60s", count, pipeline.tokenizer.length, prompt)
    ids = pipeline.tokenizer(prompts)
    return _encode_ids(pipeline.text_encoder, pipeline.text_params, jnp.asarray(ids))


@partial(jax.jit, static_argnums=0)
def _encode_ids(module: ClipTextEncoder, params: PyTree, ids_PN: Array) -> Array:
    return module.apply({"params": params}, ids_PN).astype(jnp.float32)


def export_pipeline(path, pipeline: Pipeline, unet_params: PyTree, *, note: str | None = None) -> None:
    """Writes a folder that diffusers' `StableDiffusionPipeline.from_pretrained` reads: the source's parts, and the UNet
    `unet_params`.

    The source's licence files and model card are carried along, the card with `note` below: a model unlearned from Stable
    Diffusion is a derivative, and its licence asks for that. The folder appears whole or not at all.

    Raises:
      UserError: `path` is the source or holds something else, is not local, or cannot be written.
    """
    check("://" not in str(path), f"{path} is no local folder; a pipeline is exported to one (config.export=unet goes anywhere)")
    path, source = Path(path), pipeline.path
    check_replaceable(path, source)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        export_diffusers(temporary / "unet", pipeline.unet, unet_params, source=source / "unet", note=note)
        parts = [
            entry
            for entry in sorted(source.iterdir())
            if entry.is_dir() and not entry.name.startswith(".") and entry.name != "unet"
        ]
        for part in parts:
            shutil.copytree(part, temporary / part.name, symlinks=False)
        write_json(temporary / "model_index.json", _model_index(source, {"unet", *(part.name for part in parts)}))
        write_text(temporary / "README.md", model_card(source, note))
        for name, content in licences(source).items():
            write_bytes(temporary / name, content)
        move_into_place(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _model_index(source: Path, parts: set[str]) -> dict:
    """The source's index without the parts that the source itself lacks, which diffusers would look for."""
    default = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if (source / "model_index.json").is_file():
        default = read_json(source / "model_index.json")
    else:
        default["scheduler"][1] = read_json(source / "scheduler" / "scheduler_config.json").get(
            "_class_name", "PNDMScheduler"
        )
    return {
        name: [None, None] if isinstance(value, list) and name not in parts else value for name, value in default.items()
    }


def _load_text(module: ClipTextEncoder, folder: Path) -> PyTree:
    """Reads the weights of transformers' `CLIPTextModel`, whose names began with `text_model.` until version 5."""
    target = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    stem = "pytorch_model" if not [*folder.glob("model*.safetensors*")] else "model"
    path, state = open_weights(folder, stem)
    return from_torch(_Unprefixed(state), target, table=_TEXT_TABLE, where=str(path))


class _Unprefixed(Mapping[str, np.ndarray]):
    """A view of named tensors without the prefix."""

    def __init__(self, state):
        self._state = state
        self._names = {name.removeprefix(_PREFIX): name for name in state}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._state[self._names[name]]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._state.shape(self._names[name])

    def __iter__(self):
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _config(folder: Path) -> dict:
    check((folder / "config.json").is_file(), f"no config.json in {folder}; download the whole pipeline")
    config = read_json(folder / "config.json")
    check(isinstance(config, dict), f"{folder / 'config.json'} holds no JSON object; restore it")
    return config


def _check_fit(
    folder: Path, unet: UNet2DCondition, vae: AutoencoderKL, text: ClipTextEncoder, tokenizer: ClipTokenizer
) -> None:
    """Raises `UserError` if the parts are not of one model."""
    scheduler = folder / "scheduler" / "scheduler_config.json"
    check(scheduler.is_file(), f"no {scheduler}; it is the noise schedule that the model was trained with")
    fits = unet.in_channels == unet.out_channels == vae.latent_channels
    check(
        fits,
        f"{folder}: the UNet takes {unet.in_channels} and gives {unet.out_channels} channels and the VAE's latents have "
        f"{vae.latent_channels}; inpainting, depth and upscaling models are not supported",
    )
    fits = unet.cross_attention_dim == text.hidden_size
    check(
        fits,
        f"{folder}: the UNet reads prompts of {unet.cross_attention_dim} features, the text encoder gives {text.hidden_size}",
    )
    fits = (
        max(tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) < text.vocab_size
        and tokenizer.length <= text.max_position_embeddings
    )
    check(fits, f"{folder}: the tokenizer's ids or length do not fit the text encoder's {text.vocab_size} tokens")
