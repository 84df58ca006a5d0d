"""A pipeline's folder with an unlearned network, written for diffusers' `from_pretrained` of the pipeline's class."""

import logging
import re
import shutil
from pathlib import Path

from retrack_jax.checkpoints.diffusers_export import card_and_licenses, export_diffusers, replacing, write_files
from retrack_jax.checkpoints.stable_diffusion import Pipeline, class_of_parts
from retrack_jax.checks import check
from retrack_jax.files import read_object, write_json
from retrack_jax.notation import PyTree
from retrack_jax.weights.folder import AUTOENCODER_FOLDERS, NETWORK_FOLDERS, model_folder, read_config
from retrack_jax.weights.kinds import T5, is_sd3, pipeline_index, text_encoders, tokenizer_of

# Weights, whole, in shards or their index; of one precision among several: `model.fp16.safetensors`, `model.bin.index.fp16.json`.
_WEIGHTS = re.compile(r"(\w*model)(?:\.(\w+?))?(?:-\d+-of-\d+)?(\.safetensors|\.bin)(?:\.index(?:\.(\w+))?\.json)?")

# Of pipelines without a model_index.json to list them.
_PARTS = {
    *AUTOENCODER_FOLDERS, "text_encoder", "text_encoder_2", T5, *map(tokenizer_of, ("text_encoder", "text_encoder_2", T5)),
    "scheduler", "safety_checker", "feature_extractor",
}  # fmt: skip
log = logging.getLogger(__name__)


def export_pipeline(path, pipeline: Pipeline, unet_params: PyTree, *, note: str | None = None) -> None:
    """Writes a folder that diffusers' `StableDiffusionPipeline.from_pretrained` reads; see `export_folder`.

    Raises:
      UserError: also if the pipeline was read from one file, whose other parts no folder holds.
    """
    check_one_folder(pipeline)
    export_folder(path, pipeline.path, pipeline.unet, unet_params, note=note)


def check_one_folder(pipeline: Pipeline) -> None:
    """Raises `UserError` if the weights of `pipeline` came from one file: the folder beside them is another model's."""
    check(
        pipeline.file is None,
        "a pipeline is exported with the other parts of its folder, and this model is one file; choose single_file or unet",
    )


def export_folder(path, source: Path, module, params: PyTree, *, note: str | None = None) -> None:
    """Writes the pipeline in the folder `source` as diffusers reads it, with other parameters of the network that denoises.

    Only folders that are parts of the pipeline are copied: beside them may lie what the model was trained with, and checkpoints
    that still remember. The source's license files and model card are carried along, the card with `note` below: a model
    unlearned from Stable Diffusion is a derivative, and its license asks for that. The folder appears whole or not at all.

    Raises:
      UserError: `path` is the source or holds something else, is not local, or cannot be written.
    """
    check("://" not in str(path), f"{path} is no local folder; a pipeline is exported to one (config.export=unet goes anywhere)")
    with replacing(path, source) as folder:
        folder.mkdir(parents=True)
        network = model_folder(source)
        name = "transformer" if network.name == "transformer" else "unet"
        export_diffusers(folder / name, module, params, source=network, note=note)
        named = {part for part, value in pipeline_index(source).items() if isinstance(value, list)} or _PARTS
        folders = [entry for entry in sorted(source.iterdir()) if entry.is_dir() and entry.name not in NETWORK_FOLDERS]
        parts = [entry for entry in folders if entry.name in named]
        if others := [entry.name for entry in folders if entry not in parts and not entry.name.startswith(".")]:
            log.info("folders of %s that are no parts of the pipeline are left out: %s", source, ", ".join(others))
        for part in parts:
            shutil.copytree(part, folder / part.name, symlinks=False)
            _name_plainly(folder / part.name)
        index = _model_index(source, {name, *(part.name for part in parts)})
        write_json(folder / "model_index.json", index | {name: ["diffusers", module.class_name]})
        write_files(folder, card_and_licenses(source, note))


def _name_plainly(folder: Path) -> None:
    """Renames a variant's weights if there are no others of their kind: our network is exported as no variant, and diffusers
    reads all parts of one pipeline under one variant."""
    variants: dict[tuple[str, str], dict[Path, str]] = {}
    for file in folder.iterdir():
        if match := _WEIGHTS.fullmatch(file.name):
            variants.setdefault((match[1], match[3]), {})[file] = match[2] or match[4] or ""
    for files in variants.values():
        if len(names := set(files.values())) > 1 or names == {""}:
            continue
        for file, variant in files.items():
            if file.suffix == ".json":
                index = read_object(file)
                parts = {name: part.replace(f".{variant}-", "-") for name, part in index["weight_map"].items()}
                write_json(file, {**index, "weight_map": parts})
            file.rename(folder / file.name.replace(f".{variant}", "", 1))


def _model_index(source: Path, parts: set[str]) -> dict:
    """The source's index without the parts that the source itself lacks, which diffusers would look for."""
    index = pipeline_index(source) or _index_of_parts(source, parts)
    lacking = [name for name, value in index.items() if isinstance(value, list) and name not in parts]
    return index | {name: [None, None] for name in lacking}


def _index_of_parts(source: Path, parts: set[str]) -> dict:
    """The index of a pipeline that has none, as old ones."""
    usual = "PNDMScheduler" if "text_encoder" in parts else "DDIMScheduler"
    scheduler = read_object(source / "scheduler" / "scheduler_config.json").get("_class_name", usual)
    index: dict = {"scheduler": ["diffusers", scheduler]}
    if "text_encoder" not in parts:
        coder = next(name for name in AUTOENCODER_FOLDERS if name in parts)
        name = "DiTPipeline" if "transformer" in parts else "LDMPipeline"
        return index | {"_class_name": name, coder: ["diffusers", read_config(source / coder)["_class_name"]]}
    texts, sd3 = text_encoders(source), is_sd3(source)
    index |= {"_class_name": class_of_parts(source), "vae": ["diffusers", "AutoencoderKL"]}
    for part in texts:
        clip = "CLIPTextModelWithProjection" if sd3 or part != texts[0] else "CLIPTextModel"
        classes = ("T5EncoderModel", "T5TokenizerFast") if part == T5 else (clip, "CLIPTokenizer")
        index |= {name: ["transformers", kind] for name, kind in zip((part, tokenizer_of(part)), classes, strict=True)}
    if len(texts) == 1:
        index |= {"feature_extractor": [None, None], "requires_safety_checker": False, "safety_checker": [None, None]}
    return index
