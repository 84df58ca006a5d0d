"""A pipeline's folder with an unlearned network, written for diffusers' `from_pretrained` of the pipeline's class."""

import re
import shutil
from pathlib import Path

from retrack_jax.checkpoints.diffusers_export import export_diffusers, licenses, model_card, replacing
from retrack_jax.checkpoints.stable_diffusion import Pipeline
from retrack_jax.checks import check
from retrack_jax.files import read_object, write_bytes, write_json, write_text
from retrack_jax.notation import PyTree
from retrack_jax.weights.folder import AUTOENCODER_FOLDERS, NETWORK_FOLDERS, model_folder, read_config

# Weights of one precision among several: `model.fp16.safetensors`.
_VARIANT = re.compile(r"(diffusion_pytorch_model|pytorch_model|model)\.\w+(\.safetensors|\.bin)")


def export_pipeline(path, pipeline: Pipeline, unet_params: PyTree, *, note: str | None = None) -> None:
    """Writes a folder that diffusers' `StableDiffusionPipeline.from_pretrained` reads; see `export_folder`."""
    export_folder(path, pipeline.path, pipeline.unet, unet_params, note=note)


def export_folder(path, source: Path, module, params: PyTree, *, note: str | None = None) -> None:
    """Writes the pipeline in the folder `source` as diffusers reads it, with other parameters of the network that denoises.

    The source's license files and model card are carried along, the card with `note` below: a model unlearned from Stable
    Diffusion is a derivative, and its license asks for that. The folder appears whole or not at all.

    Raises:
      UserError: `path` is the source or holds something else, is not local, or cannot be written.
    """
    check("://" not in str(path), f"{path} is no local folder; a pipeline is exported to one (config.export=unet goes anywhere)")
    with replacing(path, source) as folder:
        folder.mkdir(parents=True)
        network = model_folder(source)
        name = "transformer" if network.name == "transformer" else "unet"
        export_diffusers(folder / name, module, params, source=network, note=note)
        folders = [entry for entry in sorted(source.iterdir()) if entry.is_dir()]
        parts = [part for part in folders if part.name not in NETWORK_FOLDERS and not part.name.startswith(".")]
        for part in parts:
            shutil.copytree(part, folder / part.name, symlinks=False)
            _name_plainly(folder / part.name)
        index = _model_index(source, {name, *(part.name for part in parts)})
        write_json(folder / "model_index.json", index | {name: ["diffusers", module.class_name]})
        write_text(folder / "README.md", model_card(source, note))
        for license_name, content in licenses(source).items():
            write_bytes(folder / license_name, content)


def _name_plainly(folder: Path) -> None:
    """Renames a variant's weights if there are no others of their kind: our network is exported as no variant, and diffusers
    reads all parts of one pipeline under one variant."""
    variants: dict[str, list[Path]] = {}
    for file in folder.iterdir():
        if match := _VARIANT.fullmatch(file.name):
            variants.setdefault(match[1] + match[2], []).append(file)
    for name, files in variants.items():
        if len(files) == 1 and not (folder / name).exists():
            files[0].rename(folder / name)


def _model_index(source: Path, parts: set[str]) -> dict:
    """The source's index without the parts that the source itself lacks, which diffusers would look for."""
    default: dict = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if "text_encoder" not in parts:
        coder = next(name for name in AUTOENCODER_FOLDERS if name in parts)
        kind = read_config(source / coder)["_class_name"]
        name = "DiTPipeline" if "transformer" in parts else "LDMPipeline"
        default = {"_class_name": name, "scheduler": ["diffusers", "DDIMScheduler"], coder: ["diffusers", kind]}
    if (source / "model_index.json").is_file():
        default = read_object(source / "model_index.json")
    else:
        scheduler = read_object(source / "scheduler" / "scheduler_config.json")
        default["scheduler"][1] = scheduler.get("_class_name", default["scheduler"][1])
    lacking = [name for name, value in default.items() if isinstance(value, list) and name not in parts]
    return default | {name: [None, None] for name in lacking}
