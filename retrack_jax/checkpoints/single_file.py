"""Stable Diffusion 1.x and 2.x in one file of weights, as webui, ComfyUI and kohya's scripts use it: read, and written.

Such a file has no configs and no tokenizer. They come from a folder that diffusers saved, or from the hub: as for diffusers'
`from_single_file`, those of Stable Diffusion 1.5 by default. A file of 2.x does not say what its network predicts, so its folder
must be given.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np

from retrack_jax.checkpoints.diffusers_export import licenses, model_card, replacing
from retrack_jax.checks import UserError, check
from retrack_jax.files import file_digest, write_bytes, write_text, write_whole
from retrack_jax.notation import PyTree
from retrack_jax.weights.file_tensors import FileTensors
from retrack_jax.weights.folder import TRANSFORMERS_WEIGHTS, open_file, open_weights
from retrack_jax.weights.hub import is_id, local_model, snapshot, text_files
from retrack_jax.weights.ldm_names import OPEN_CLIP, PREFIXES, PartOfFile, in_file, places
from retrack_jax.weights.names import TorchTensor, new_attention_name, to_torch, torch_shapes
from retrack_jax.weights.safetensors_io import write_safetensors

NAME = "model.safetensors"  # of the file in an export
_STABLE_DIFFUSION_1 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
# Of averaged weights, which an unlearned network must not be accompanied by: programs may take them in its place.
_AVERAGED = "model_ema."


class SingleFile:
    """The tensors of one file, by part.

    Raises:
      UserError: the file is damaged, or holds something else, such as Stable Diffusion XL or a LoRA.
    """

    def __init__(self, path: Path):
        self.path, self._tensors = path, open_file(path)
        wrapped = any(name.startswith("state_dict.") for name in self._tensors)
        self._wrapper = "state_dict." if wrapped else ""  # of training scripts, next to what else they save
        held = [name for name in self._tensors if name.startswith(self._wrapper)]
        names = self._names = [name.removeprefix(self._wrapper) for name in held]
        if any(name.startswith("conditioner.embedders.") for name in names):
            raise UserError(f"{path} holds Stable Diffusion XL, which is not supported; give Stable Diffusion 1.x or 2.x")
        if any("lora_" in name or ".lora." in name for name in names):
            raise UserError(f"{path} holds a LoRA, which changes a model and is none; merge it into its model, and give that")
        lacking = [part for part, prefix in PREFIXES.items() if not any(name.startswith(prefix) for name in names)]
        if lacking:
            wanted = " and ".join(f"{PREFIXES[part]}*" for part in lacking)
            raise UserError(f"{path} is no whole Stable Diffusion in one file: it has no {wanted}; give one that has all parts")
        self.open_clip = any(name.startswith(OPEN_CLIP) for name in names)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file, which takes as long as reading it."""
        return file_digest(self.path)

    def part(self, part: str, target: PyTree) -> FileTensors:
        """Returns the tensors of a part under the names of diffusers and transformers; `target` has its network's shapes."""
        where = places(part, torch_shapes(target), self.open_clip)
        where = {name: place._replace(name=self._wrapper + place.name) for name, place in where.items()}
        return PartOfFile(self._tensors, where, self._wrapper + PREFIXES[part])

    def besides_unet(self) -> dict[str, np.ndarray]:
        """Returns everything but the UNet and averages of it, as the file has it."""
        others = [name for name in self._names if not name.startswith((PREFIXES["unet"], _AVERAGED))]
        return {name: self._tensors[self._wrapper + name] for name in others}

    def configs(self, given: str) -> Path:
        """Returns the folder with the configs and the tokenizer: `given`, a folder or an id, or what goes with the file.

        Raises `UserError` if nothing is given and the file does not tell, or the hub does not give it.
        """
        check(
            bool(given) or not self.open_clip,
            f"{self.path} is of Stable Diffusion 2.x, and does not say what its network predicts; set config.pipeline to the "
            "folder or the hub's name of the model that it was made from",
        )
        name = given or _STABLE_DIFFUSION_1
        return snapshot(name, text_files) if is_id(name) else local_model(name)


def export_single_file(path, pipeline, unet_params: PyTree, *, note: str | None = None) -> None:
    """Writes the folder `path` with one file of the pipeline and the UNet `unet_params`, licenses and a model card.

    The other parts are as in the source, bit for bit. diffusers' `from_single_file` reads the file.

    Raises:
      UserError: as `export_diffusers`; or `path` is not local.
    """
    check("://" not in str(path), f"{path} is no local folder; one file is exported to one (config.export=unet goes anywhere)")
    source = pipeline.path
    with replacing(path, source) as folder:
        folder.mkdir(parents=True)
        others = pipeline.file.besides_unet() if pipeline.file else _parts_of_folder(pipeline)
        tensors = [*_unet_tensors(unet_params), *_as_tensors(others)]
        write_whole(folder / NAME, lambda temporary: write_safetensors(temporary, tensors))
        for name, content in licenses(source).items():
            write_bytes(folder / name, content)
        write_text(folder / "README.md", model_card(source, note))


def _unet_tensors(params: PyTree) -> list[TorchTensor]:
    tensors = list(to_torch(params))
    where = places("unet", [tensor.name for tensor in tensors])
    return [tensor._replace(name=where[tensor.name].name) for tensor in tensors]


def _parts_of_folder(pipeline) -> dict[str, np.ndarray]:
    """The VAE and the text encoder of a folder, as a single file keeps them."""
    _, vae = open_weights(pipeline.path / "vae")
    _, text = open_weights(pipeline.path / "text_encoder", TRANSFORMERS_WEIGHTS)
    vae = {new_attention_name(name): vae[name] for name in vae}
    text = {name.removeprefix("text_model."): text[name] for name in text if not name.endswith("position_ids")}
    second = pipeline.text_encoders[0].module.hidden_act == "gelu"  # 2.x; OpenAI's encoder, of 1.x, has quick_gelu
    return in_file(places("vae", vae), vae) | in_file(places("text_encoder", text, second), text)


def _as_tensors(arrays: Mapping[str, np.ndarray]) -> Iterator[TorchTensor]:
    for name, array in sorted(arrays.items()):
        yield TorchTensor(name, array.dtype, array.shape, lambda array=array: np.ascontiguousarray(array))
