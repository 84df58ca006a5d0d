"""A whole Stable Diffusion folder, read: UNet, VAE, text encoder, tokenizer and noise schedule as diffusers lays them out.

    model_index.json  unet/  vae/  text_encoder/  tokenizer/  scheduler/     and, carried along unread, safety_checker/
    feature_extractor/

Stable Diffusion 1.x and 2.x are supported. Weights in float16 are read into float32.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from retrack_jax.checkpoints.diffusers_import import FAMILIES, load_params, read_schedule_config
from retrack_jax.checkpoints.single_file import SingleFile
from retrack_jax.checks import UserError, check
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.files import json_digest, read_object
from retrack_jax.models.clip_text import ClipTextEncoder
from retrack_jax.models.tokenizer import ClipTokenizer, load_tokenizer
from retrack_jax.models.unet2d_condition import UNet2DCondition
from retrack_jax.models.vae import AutoencoderKL
from retrack_jax.notation import Array, PyTree
from retrack_jax.weights.folder import DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS, read_config, weights_digest
from retrack_jax.weights.hub import local_model
from retrack_jax.weights.names import DIFFUSERS, RenameTable, from_torch, param_shapes

_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
# Names of transformers' `CLIPTextModel` began with `text_model.` until version 5; old versions saved a buffer of positions.
_TEXT_TABLE = RenameTable(
    canonical=lambda name: name.removeprefix("text_model."), ignored=(r"embeddings\.position_ids",)
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Pipeline:
    """The parts of a text-to-image model. Modules are Linen modules; parameters are trees of arrays, the UNet's on the host.

    Attributes:
      path: the folder they came from; of a single file, that of its configs.
      vae_digest: SHA-256 over the VAE's config and weights, which keys caches of latents.
      file: the single file that the weights came from, if they did.
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
    file: SingleFile | None = None

    def encode_pixels(self, x_BHWC: Array) -> tuple[Array, Array]:
        """Returns mean and std of the scaled latents of images in [-1, 1]; see `AutoencoderKL.encode`."""
        return self.vae.apply({"params": self.vae_params}, x_BHWC, method="encode")


def load_pipeline(path, *, configs: str = "", dtype=jnp.float32, remat: bool = False) -> Pipeline:
    """Returns the Stable Diffusion pipeline at `path`.

    Args:
      path: a folder, as diffusers saves it; weights as safetensors or `.bin`, float32 or float16; or its id on the hub; or one
        file of weights (single_file.py).
      configs: the folder or id with the configs and the tokenizer of a single file; empty: those that go with it.
      dtype: what the networks compute in.
      remat: whether the UNet computes activations again in the backward pass.

    Raises:
      UserError: a part is missing or does not fit the others, or the folder holds another kind of model, such as
        Stable Diffusion XL.
    """
    folder, file = _folder_and_file(path, configs)
    check_pipeline(folder)
    unet = UNet2DCondition.from_config(read_config(folder / "unet"), dtype=dtype, remat=remat)
    vae = AutoencoderKL.from_config(read_config(folder / "vae"), dtype=dtype)
    text_encoder = ClipTextEncoder.from_config(read_config(folder / "text_encoder"), dtype=dtype)
    tokenizer = load_tokenizer(folder / "tokenizer")
    _check_fit(folder, unet, vae, text_encoder, tokenizer)
    schedule = Schedule.from_config(read_schedule_config(folder))

    pixels, ids = jnp.zeros((1, vae.downscale, vae.downscale, vae.in_channels)), jnp.zeros((1, 1), jnp.int32)

    def params(part: str, module, *inputs, names=DIFFUSERS_WEIGHTS, table=DIFFUSERS) -> PyTree:
        if file is None:
            return load_params(module, folder / part, *inputs, names=names, table=table)
        target = param_shapes(module, *inputs)
        return from_torch(file.part(part, target), target, table=table, where=str(file.path), network=f"the {part} of {folder}")

    vae_weights = weights_digest(folder / "vae") if file is None else file.digest
    return Pipeline(
        path=folder,
        unet=unet,
        unet_params=params("unet", unet, *FAMILIES["UNet2DConditionModel"].inputs(unet)),
        vae=vae,
        vae_params=jax.device_put(params("vae", vae, pixels)),
        text_encoder=text_encoder,
        text_params=jax.device_put(params("text_encoder", text_encoder, ids, names=TRANSFORMERS_WEIGHTS, table=_TEXT_TABLE)),
        tokenizer=tokenizer,
        schedule=schedule,
        vae_digest=json_digest([read_config(folder / "vae"), vae_weights, str(jnp.dtype(dtype))]),
        file=file,
    )


def pipeline_folder(path, configs: str = "") -> Path:
    """Returns the folder with the configs and the tokenizer of a pipeline; arguments and errors as `load_pipeline`'s."""
    return _folder_and_file(path, configs)[0]


def _folder_and_file(path, configs: str) -> tuple[Path, SingleFile | None]:
    place = local_model(path)
    if not place.is_file():
        return place, None
    file = SingleFile(place)
    return file.configs(configs), file


def check_pipeline(folder) -> None:
    """Raises `UserError` unless `folder` has every part of a Stable Diffusion 1.x or 2.x pipeline; names what it is instead."""
    folder = Path(folder).expanduser()
    there = folder.is_dir()
    hint = "set config.checkpoint to a Stable Diffusion folder or its name on the hub (see docs/guide/text-to-image.md)"
    check(there, f"no folder {folder}; {hint}")
    index = read_object(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    name = str(index.get("_class_name", "StableDiffusionPipeline"))
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
            f"{folder} has no {', '.join(missing)} folder; download the whole pipeline (see docs/guide/text-to-image.md)"
        )


def prompt_embeddings(pipeline: Pipeline, prompts: Sequence[str]) -> Array:
    """Returns float32 `[P, N, D]`: the text encoder's hidden states after its final norm, padding included, N = 77 for CLIP.

    A prompt longer than 75 tokens is cut, with a warning that says how long it is.
    """
    for prompt in prompts:
        if (count := pipeline.tokenizer.count(prompt)) > pipeline.tokenizer.length:
            _log.warning("a prompt of %d tokens is cut to %d: %.60s", count, pipeline.tokenizer.length, prompt)
    return encode_ids(pipeline, pipeline.tokenizer(prompts))


def encode_ids(pipeline: Pipeline, ids_PN) -> Array:
    """Returns `prompt_embeddings` of token ids, int32 `[P, N]`."""
    return _encode_ids(pipeline.text_encoder, pipeline.text_params, jnp.asarray(ids_PN))


def text_digest(pipeline: Pipeline) -> str:
    """Returns a SHA-256 over the text encoder's config, weights and precision, which keys caches of its states."""
    folder, file = pipeline.path / "text_encoder", pipeline.file
    weights = weights_digest(folder, TRANSFORMERS_WEIGHTS) if file is None else file.digest
    return json_digest([read_config(folder), weights, str(jnp.dtype(pipeline.text_encoder.dtype))])


@partial(jax.jit, static_argnums=0)
def _encode_ids(module: ClipTextEncoder, params: PyTree, ids_PN: Array) -> Array:
    return module.apply({"params": params}, ids_PN).astype(jnp.float32)


def _check_fit(folder: Path, unet: UNet2DCondition, vae: AutoencoderKL, text: ClipTextEncoder, tokenizer: ClipTokenizer) -> None:
    """Raises `UserError` if the parts are not of one model."""
    scheduler = folder / "scheduler" / "scheduler_config.json"
    check(scheduler.is_file(), f"no {scheduler}; it is the noise schedule that the model was trained with")
    check(
        unet.in_channels == unet.out_channels == vae.latent_channels,
        f"{folder}: the UNet takes {unet.in_channels} and gives {unet.out_channels} channels and the VAE's latents have "
        f"{vae.latent_channels}; inpainting, depth and upscaling models are not supported",
    )
    check(
        unet.cross_attention_dim == text.hidden_size,
        f"{folder}: the UNet reads prompts of {unet.cross_attention_dim} features, the text encoder gives {text.hidden_size}",
    )
    known = max(tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) < text.vocab_size
    check(
        known and tokenizer.length <= text.max_position_embeddings,
        f"{folder}: the tokenizer's ids or length do not fit the text encoder's {text.vocab_size} tokens",
    )
