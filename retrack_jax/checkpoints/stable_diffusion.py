"""A whole Stable Diffusion folder, read: UNet, VAE, text encoders, tokenizers and noise schedule as diffusers lays them out.

    model_index.json  unet/  vae/  text_encoder/  tokenizer/  scheduler/     of XL also text_encoder_2/  tokenizer_2/
    safety_checker/  feature_extractor/                                      carried along unread

Stable Diffusion 1.x, 2.x, XL and 3 are supported; 3 has XL's parts, but transformer/ in place of unet/, and a third text encoder,
T5, which it can do without. Weights in float16 are read into float32, but for T5's.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax.checkpoints.diffusers_import import example_inputs, load_params, read_schedule_config
from retrack_jax.checkpoints.single_file import SingleFile
from retrack_jax.checkpoints.text_encoders import (
    T5_TABLE,
    TEXT_TABLE,
    TextEncoder,
    TextModule,
    encode_ids,
    padded,
    read_modules,
    token_ids,
    warn_of_cuts,
)
from retrack_jax.checks import UserError, check
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.files import json_digest
from retrack_jax.models.clip_text import ClipTextEncoder
from retrack_jax.models.mmdit import MMDiT
from retrack_jax.models.t5_text import T5Encoder
from retrack_jax.models.tokenizer import ClipTokenizer, PromptTokenizer
from retrack_jax.models.unet2d_condition import Condition, UNet2DCondition
from retrack_jax.models.vae import AutoencoderKL
from retrack_jax.notation import Array, PyTree
from retrack_jax.weights.folder import DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS, read_config, weights_digest
from retrack_jax.weights.hub import local_model
from retrack_jax.weights.kinds import T5, is_sd3, pipeline_index, text_encoders, tokenizer_of
from retrack_jax.weights.names import DIFFUSERS, from_torch, param_shapes

# diffusers' class of a supported pipeline -> its text encoders; each has a tokenizer of the same number.
_TEXT_ENCODERS = {
    "StableDiffusionPipeline": ("text_encoder",),
    "StableDiffusionXLPipeline": ("text_encoder", "text_encoder_2"),
    "StableDiffusion3Pipeline": ("text_encoder", "text_encoder_2"),
}
_SUPPORTED = "give a Stable Diffusion 1.x, 2.x, XL or 3 folder"


@dataclass(frozen=True, eq=False)
class Pipeline:
    """The parts of a text-to-image model. Modules are Linen modules; parameters are trees of arrays, the UNet's on the host.

    Attributes:
      path: the folder they came from; of a single file, that of its configs.
      unet: the network that denoises, of Stable Diffusion 3 a transformer.
      text_encoders: one, or the two of XL, or the two or three of 3.
      zeros_for_empty: whether zeros stand for an empty prompt, as in XL, and not its states.
      vae_digest: SHA-256 over the VAE's config and weights, which keys caches of latents.
      file: the single file that the weights came from, if they did.
    """

    path: Path
    unet: UNet2DCondition | MMDiT
    unet_params: PyTree
    vae: AutoencoderKL
    vae_params: PyTree
    text_encoders: tuple[TextEncoder, ...]
    schedule: Schedule
    vae_digest: str
    zeros_for_empty: bool = False
    file: SingleFile | None = None

    @property
    def network(self) -> str:
        """The name of the folder of the network that denoises."""
        return "transformer" if isinstance(self.unet, MMDiT) else "unet"

    @property
    def padded_width(self) -> int | None:
        """How many features `text_encoders.padded` gives the states of prompts; None: they stay as they are."""
        return self.unet.joint_attention_dim if isinstance(self.unet, MMDiT) else None

    @property
    def tokenizer(self) -> ClipTokenizer:
        """The first text encoder's, which is CLIP's."""
        return self.text_encoders[0].tokenizer

    def encode_pixels(self, x_BHWC: Array) -> tuple[Array, Array]:
        """Returns mean and std of the scaled latents of images in [-1, 1]; see `AutoencoderKL.encode`."""
        return self.vae.apply({"params": self.vae_params}, x_BHWC, method="encode")


def load_pipeline(path, *, configs: str = "", dtype=jnp.float32, remat: bool = False) -> Pipeline:
    """Returns the Stable Diffusion pipeline at `path`.

    Args:
      path: a folder, as diffusers saves it; weights as safetensors or `.bin`, float32 or float16; or its id on the hub; or one
        file of weights (single_file.py).
      configs: the folder or id with the configs and the tokenizers of a single file; empty: those that go with it.
      dtype: what the networks compute in.
      remat: whether the UNet computes activations again in the backward pass.

    Raises:
      UserError: a part is missing or does not fit the others, or the folder holds another kind of model.
    """
    folder, file = _folder_and_file(path, configs)
    parts = check_pipeline(folder)
    check(
        file is None or file.layout.text_encoders == parts,
        f"{path} holds {file and file.layout.name}, and the configs in {folder} are for {' and '.join(parts)}; set "
        "config.pipeline to the folder of the model that it was made from",
    )
    sd3 = is_sd3(folder)
    check(file is None or not sd3, f"{folder} is of Stable Diffusion 3, which is not read from one file; give the folder alone")
    family, network = (MMDiT, "transformer") if sd3 else (UNet2DCondition, "unet")
    unet = family.from_config(with_mended_size(read_config(folder / network)), dtype=dtype, remat=remat)
    vae_config = read_config(folder / "vae")
    # XL's first VAE overflows in half precision, and says so; its fixed one does not.
    vae_dtype = jnp.float32 if len(parts) > 1 and vae_config.get("force_upcast", True) else dtype
    vae = AutoencoderKL.from_config(vae_config, dtype=vae_dtype)
    texts = read_modules(folder, parts, dtype, all_project=sd3)
    _check_fit(folder, unet, vae, [module for module, _ in texts])
    scheduler = read_schedule_config(folder)
    schedule = Schedule.from_config(scheduler) if file is None else file.schedule(scheduler, folder)
    check(schedule.is_flow or not sd3, f"{folder}: the scheduler is no flow's, and Stable Diffusion 3 is one; give its own")
    if len(parts) == 1 and schedule.has_betas and (schedule.clip_sample or schedule.steps_offset != 1):
        # As diffusers' StableDiffusionPipeline does: early configs leave the two out, and latents go beyond [-1, 1].
        schedule = Schedule.from_config(schedule.to_config() | {"clip_sample": False, "steps_offset": 1})

    pixels, ids = jnp.zeros((1, vae.downscale, vae.downscale, vae.in_channels)), jnp.zeros((1, 1), jnp.int32)

    def params(part: str, module, *inputs, names=DIFFUSERS_WEIGHTS, table=DIFFUSERS) -> PyTree:
        if file is None:
            dtype = None if part == T5 else np.float32
            return load_params(module, folder / part, *inputs, names=names, table=table, dtype=dtype)
        target = param_shapes(module, *inputs)
        return from_torch(file.part(part, target), target, table=table, where=str(file.path), network=f"the {part} of {folder}")

    def text_encoder(part: str, module: TextModule, tokenizer: PromptTokenizer) -> TextEncoder:
        own = params(part, module, ids, names=TRANSFORMERS_WEIGHTS, table=T5_TABLE if part == T5 else TEXT_TABLE)
        if len(parts) == 1:  # two take 3.3 GB, which training needs: they stay on the host
            own = jax.device_put(own)
        return TextEncoder(module, own, tokenizer, partial(_text_digest, folder / part, file, dtype))

    vae_weights = weights_digest(folder / "vae") if file is None else file.digest
    return Pipeline(
        path=folder,
        unet=unet,
        unet_params=params(network, unet, *example_inputs(unet)),
        vae=vae,
        vae_params=jax.device_put(params("vae", vae, pixels)),
        text_encoders=tuple(text_encoder(part, *read) for part, read in zip(parts, texts, strict=True)),
        schedule=schedule,
        vae_digest=json_digest([vae_config, vae_weights, str(jnp.dtype(vae_dtype))]),
        zeros_for_empty=len(parts) > 1 and not sd3 and bool(pipeline_index(folder).get("force_zeros_for_empty_prompt", True)),
        file=file,
    )


def with_mended_size(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the config of a pipeline's UNet with the `sample_size` that diffusers' StableDiffusionPipeline takes it to have.

    Before diffusers 0.9 those of models of 512 pixels, 64 latents, said 32.
    """
    size, version = config.get("sample_size"), re.match(r"(\d+)\.(\d+)", str(config.get("_diffusers_version")))
    early = version is not None and tuple(map(int, version.groups())) < (0, 9)
    return {**config, "sample_size": 64} if early and isinstance(size, int) and size < 64 else config


def pipeline_folder(path, configs: str = "") -> Path:
    """Returns the folder with the configs and the tokenizer of a pipeline; arguments and errors as `load_pipeline`'s."""
    return _folder_and_file(path, configs)[0]


def _folder_and_file(path, configs: str) -> tuple[Path, SingleFile | None]:
    place = local_model(path)
    if not place.is_file():
        return place, None
    file = SingleFile(place)
    return file.configs(configs), file


def check_pipeline(folder) -> tuple[str, ...]:
    """Returns the names of the text encoders of the pipeline in `folder`: one, or the two of XL, or the two or three of 3.

    Raises `UserError` unless `folder` has every part of a Stable Diffusion 1.x, 2.x, XL or 3 pipeline; names what it is instead.
    """
    folder = Path(folder).expanduser()
    there = folder.is_dir()
    hint = "set config.checkpoint to a Stable Diffusion folder or its name on the hub (see docs/guide/text-to-image.md)"
    check(there, f"no folder {folder}; {hint}")
    index = pipeline_index(folder)
    name = str(index.get("_class_name", class_of_parts(folder)))
    if name not in _TEXT_ENCODERS and name.startswith("StableDiffusion"):  # the same parts for another use, such as Img2Img
        name = class_of_parts(folder)
    if "XL" in name and (index.get("requires_aesthetics_score") or not (folder / "text_encoder").is_dir()):
        refiner = (folder / "text_encoder_2").is_dir()
        check(not refiner, f"{folder} holds Stable Diffusion XL's refiner, which is not supported; give the base model's folder")
    check(name in _TEXT_ENCODERS, f"{folder} holds a {name}, which is not supported; {_SUPPORTED}")
    encoders = text_encoders(folder) if is_sd3(folder) else _TEXT_ENCODERS[name]
    network = "transformer" if name == "StableDiffusion3Pipeline" else "unet"
    parts = (network, "vae", *encoders, *map(tokenizer_of, encoders), "scheduler")
    missing = [part for part in parts if not (folder / part).is_dir()]
    if missing:
        without = f", or set {T5} and tokenizer_3 to [null, null] in model_index.json to do without T5" if T5 in missing else ""
        raise UserError(
            f"{folder} has no {', '.join(missing)} folder; download the whole pipeline (see docs/guide/text-to-image.md){without}"
        )
    return encoders


def class_of_parts(folder: Path) -> str:
    """Returns diffusers' class of a pipeline whose folder has no model_index.json to name it."""
    if is_sd3(folder):
        return "StableDiffusion3Pipeline"
    return "StableDiffusionXLPipeline" if (folder / "text_encoder_2").is_dir() else "StableDiffusionPipeline"


def prompt_embeddings(pipeline: Pipeline, prompts: Sequence[str]) -> Condition:
    """Returns float32 `[P, N, D]`: the text encoder's hidden states after its final norm, padding included; N is mostly 77.

    Of XL and 3 it is the dict of `text_encoders.encode_ids`; XL's UNet takes it with `time_ids` added. Of a long prompt CLIP
    reads N - 2 tokens and T5 255, with a warning.
    """
    warn_of_cuts(pipeline.text_encoders, prompts)
    return padded(encode_ids(pipeline.text_encoders, token_ids(pipeline.text_encoders, prompts)), pipeline.padded_width)


def empty_prompt(pipeline: Pipeline) -> Condition:
    """Returns `prompt_embeddings` of one empty prompt, or the zeros that stand for it."""
    empty = prompt_embeddings(pipeline, [""])
    return jax.tree.map(jnp.zeros_like, empty) if pipeline.zeros_for_empty else empty


def _text_digest(folder: Path, file: SingleFile | None, dtype) -> str:
    weights = weights_digest(folder, TRANSFORMERS_WEIGHTS) if file is None else file.digest
    return json_digest([read_config(folder), weights, str(jnp.dtype(dtype))])


def _check_fit(folder: Path, unet: UNet2DCondition | MMDiT, vae: AutoencoderKL, texts: Sequence[TextModule]) -> None:
    """Raises `UserError` if the parts are not of one model."""
    scheduler = folder / "scheduler" / "scheduler_config.json"
    check(scheduler.is_file(), f"no {scheduler}; it is the noise schedule that the model was trained with")
    sd3 = isinstance(unet, MMDiT)
    what, makes = "transformer" if sd3 else "UNet", unet.out_channels or unet.in_channels
    check(
        unet.in_channels == makes == vae.latent_channels,
        f"{folder}: the {what} takes {unet.in_channels} and gives {makes} channels and the VAE's latents have "
        f"{vae.latent_channels}; inpainting, depth and upscaling models are not supported",
    )
    shift = vae.shift_factor
    check((shift is not None) == sd3, f"{folder}: the VAE's shift_factor is {shift}; Stable Diffusion 3 has one, and it alone")
    check(
        vae.latents_mean is None or (len(texts) > 1 and not sd3),
        f"{folder}: the VAE has a latents_mean, which diffusers heeds with Stable Diffusion XL alone; remove it and latents_std",
    )
    if sd3:
        _check_texts(folder, unet, texts)
        return
    encoders, gives = ("text encoders", "give") if len(texts) > 1 else ("text encoder", "gives")
    width = sum(text.hidden_size for text in texts)
    check(
        unet.cross_attention_dim == width,
        f"{folder}: the UNet reads prompts of {unet.cross_attention_dim} features, the {encoders} {gives} {width}",
    )
    check(
        unet.takes_sizes == (len(texts) > 1),
        f"{folder}: the UNet's addition_embed_type is {unet.addition_embed_type!r} and the pipeline has {len(texts)} "
        f"{encoders}; a Stable Diffusion XL UNet has text_time and two, others None and one",
    )
    if unet.takes_sizes:
        check(
            unet.pooled_width == texts[-1].projection_dim,
            f"{folder}: the UNet reads a pooled prompt of {unet.pooled_width} features, text_encoder_2 gives "
            f"{texts[-1].projection_dim}",
        )


def _check_texts(folder: Path, transformer: MMDiT, texts: Sequence[TextModule]) -> None:
    """Raises `UserError` unless Stable Diffusion 3's transformer takes what its text encoders give."""
    clips, takes = [text for text in texts if isinstance(text, ClipTextEncoder)], transformer.joint_attention_dim
    width, given = sum(text.hidden_size for text in clips), [text.sizes.d_model for text in texts if isinstance(text, T5Encoder)]
    check(width <= takes, f"{folder}: the transformer reads prompts of {takes} features, the text encoders give {width}")
    check(set(given) <= {takes}, f"{folder}: the transformer reads prompts of {takes} features, T5 gives {sum(given)}")
    pooled, takes = sum(text.projection_dim for text in clips), transformer.pooled_projection_dim
    what = f"the transformer reads a pooled prompt of {takes} features, the text encoders give {pooled}"
    check(pooled == takes, f"{folder}: {what}")
