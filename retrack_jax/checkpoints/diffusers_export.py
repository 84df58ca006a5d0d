"""Flax parameters, of a network or of an adapter, back to a folder that diffusers reads."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from retrack_jax.checks import UserError
from retrack_jax.diffusion import flow
from retrack_jax.files import beside, write_bytes, write_json, write_text, write_whole
from retrack_jax.notation import PyTree
from retrack_jax.weights.folder import NETWORK_FOLDERS
from retrack_jax.weights.hub import id_of, local_model
from retrack_jax.weights.names import to_torch
from retrack_jax.weights.safetensors_io import write_safetensors

# In the model card of every export: it marks a folder as ours to replace. Any other folder with content is left alone.
_HEADING = "## Exported by retrack_jax"
_LICENSES = ("LICENSE", "LICENCE", "NOTICE", "COPYING")
_CONFIGS = ("config.json", *(f"{folder}/config.json" for folder in NETWORK_FOLDERS))
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_OF_DDPM_PIPELINE = {
    "DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", *flow.CLASSES,
}  # fmt: skip
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
_LORA = "This is an adapter (LoRA): load the base model in diffusers, then call `pipe.load_lora_weights` with this folder."


def export_diffusers(path, module, params: PyTree, *, schedule=None, source=None, note: str | None = None) -> None:
    """Writes `config.json`, the weights as safetensors and a model card; the folder appears whole or not at all.

    With a schedule, `scheduler/scheduler_config.json` is written too, and a `model_index.json` where `DDPMPipeline` can draw with
    both: of a UNet2D without labels, at its `sample_size`, and a scheduler that takes the pipeline's calls and does not scale
    what the network gets.

    Args:
      path: a folder that does not exist, is empty, or is an earlier export, which is replaced. May be a `gs://` address, where
        the config goes last and without it the folder is no model.
      module: the network, with `to_config()`.
      params: its parameters; their dtypes are kept.
      schedule: a `Schedule`, or a dict as in `scheduler_config.json`.
      source: the folder that the model came from, or its id on the hub; its license files and model card are copied along, the
        card with `note` below.
      note: what was forgotten and how, for the model card.

    Raises:
      UserError: `path` is `source` or holds something else, or cannot be written; or there is no `source`.
    """
    source, config = None if source is None else local_model(source), module.to_config()
    files: dict[str, Any] = {}
    if schedule is not None:
        scheduler = {"_class_name": "DDPMScheduler"} | (schedule if isinstance(schedule, dict) else schedule.to_config())
        files["scheduler/scheduler_config.json"] = scheduler
        labels = config.get("class_embed_type") or config.get("num_class_embeds")
        if (
            config.get("_class_name") == "UNet2DModel"
            and not labels
            and config.get("sample_size")
            and scheduler["_class_name"] in _OF_DDPM_PIPELINE
        ):
            files["model_index.json"] = {
                "_class_name": "DDPMPipeline",
                "scheduler": ["diffusers", scheduler["_class_name"]],
                "unet": ["diffusers", "UNet2DModel"],
            }

    with replacing(path, source) as folder:
        write_files(folder, card_and_licenses(source, note) | files)
        write_whole(folder / _WEIGHTS, lambda temporary: write_safetensors(temporary, to_torch(params)))
        write_json(folder / "config.json", config)  # last, for without it there is no model


def export_lora(
    path, adapter: PyTree, *, rank: int, alpha: float, network: str = "unet", source=None, note: str | None = None
) -> None:
    """Writes an adapter as the folder that diffusers' `pipe.load_lora_weights` reads: peft's names after the network's, settings,
    the base model's licenses and a model card.

    Args:
      path, source, note: as in `export_diffusers`, `source` being the base model's.
      adapter: a tree of train/lora.py, of the network of a Stable Diffusion pipeline.
      rank, alpha: A B is multiplied by alpha / rank. Tensors do not tell alpha: diffusers reads it from the file's metadata, and
        readers that do not know these take alpha = rank.
      network: the name of the network's folder in the pipeline, `unet` or `transformer`.

    Raises:
      UserError: as `export_diffusers`.
    """
    tensors = [tensor._replace(name=f"{network}.{tensor.name}") for tensor in to_torch(adapter)]
    layers = sorted({tensor.name.removeprefix(f"{network}.").partition(".lora_")[0] for tensor in tensors})
    whole = int(alpha) if alpha == int(alpha) else alpha
    settings = {f"{network}.r": rank, f"{network}.lora_alpha": whole, f"{network}.target_modules": layers}
    metadata = {"lora_adapter_metadata": json.dumps(settings, indent=2, sort_keys=True)}
    with replacing(path, source) as folder:
        write_files(folder, card_and_licenses(source, "\n\n".join(text for text in (_LORA, note) if text)))
        write_whole(folder / LORA_WEIGHTS, lambda temporary: write_safetensors(temporary, tensors, metadata))


@contextlib.contextmanager
def replacing(path, source) -> Iterator[epath.Path]:
    """Yields where to write a folder that becomes `path` when the block ends; an earlier export there is replaced.

    On an object store that is `path` itself.

    Raises:
      UserError: as `export_diffusers`.
    """
    path = epath.Path(path)
    _check_replaceable(path, source)
    if "://" in str(path):
        yield path
        return
    path = Path(path)
    folder = beside(path)
    try:
        yield epath.Path(folder)
        _move_into_place(folder, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; free some space or choose another folder") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_whole(path) -> bool:
    """Whether the folder `path` holds all of an export, of any kind: on an object store one may be cut short."""
    return any((path / name).exists() for name in (*_CONFIGS, "model.safetensors", LORA_WEIGHTS))


def write_files(folder: epath.Path, files: dict[str, Any]) -> None:
    """Writes text, bytes and JSON by name. Written first, the card marks a folder that is cut short as ours."""
    writers = {str: write_text, bytes: write_bytes, dict: write_json}
    for name, content in files.items():
        writers[type(content)](folder / name, content)


def _move_into_place(folder: Path, path: Path) -> None:
    """Renames `folder` to `path`; what is there steps aside and comes back if that fails."""
    if not path.exists():
        folder.rename(path)
        return
    aside = beside(path, "old")
    path.rename(aside)
    aside.touch()  # its age is that of this move, for `files.sweep_temporaries`
    try:
        folder.rename(path)
    except OSError:
        aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _check_replaceable(path, source) -> None:
    """Raises `UserError` unless an export may go to `path`: nothing is there, or an earlier export, and it is not `source`."""
    if source is not None and not Path(source).is_dir():
        raise UserError(f"no folder {source}, where the model should have come from")
    if source is not None and Path(source).resolve() == Path(path).resolve():
        raise UserError(f"{path} is the folder that the model came from; export to another")
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"{path} is a file; export to a folder")
    card = path / "README.md"
    if any(path.iterdir()) and not (card.exists() and _HEADING in _read(card)):
        raise UserError(f"{path} holds something that is no export of retrack_jax; remove it or choose another folder")


def _read(card) -> str:
    """The text of a model card, which need not be UTF-8: a sign that is not is replaced."""
    return card.read_bytes().decode("utf-8-sig", errors="replace")


def _source_folders(source) -> list[Path]:
    """The model's own folder and, where that is a part of a pipeline, the pipeline's: license and card may lie in either."""
    if source is None:
        return []
    source = Path(source)
    name, parent = source.resolve().name, source.resolve().parent
    # Old pipelines have no index: there, a folder with a network's name and another part next to it tell one.
    unindexed = name in NETWORK_FOLDERS and any((parent / part).is_dir() for part in ("vae", "scheduler"))
    return [source, parent] if (parent / "model_index.json").is_file() or unindexed else [source]


def card_and_licenses(source, note: str | None) -> dict[str, Any]:
    """Returns file name -> content of an export's model card and of the license files that came with the model in `source`."""
    texts: dict[str, Any] = {"README.md": model_card(source, note)}
    for folder in _source_folders(source):
        for file in sorted(folder.iterdir()):
            if file.is_file() and file.name.upper().startswith(_LICENSES):
                texts.setdefault(file.name, file.read_bytes())
    return texts


def model_card(source, note: str | None) -> str:
    """Returns the text of an export's README.md: the card of `source`, if any, and below a heading of ours the `note`.

    Its metadata, which the hub reads, are those of the source's card (license, tags), with the source as `base_model` if it came
    from the hub. Metadata that are damaged stay as they are.
    """
    from huggingface_hub import ModelCard

    cards = [folder / "README.md" for folder in _source_folders(source)]
    text = next((_read(card) for card in cards if card.is_file()), "# Model card\n")
    if not text.lstrip().startswith("---"):
        text = f"---\n{{}}\n---\n{text}"  # no metadata yet; the client would warn of that
    ours = f"\n\n{_HEADING}\n\n{note or 'No note was given on how this model differs from its source.'}\n"
    try:
        card = ModelCard(text, ignore_metadata_errors=True)
    except Exception:  # of YAML and of the client, whatever its parts are
        return text.removeprefix("---\n{}\n---\n").rstrip() + ours
    card.data.library_name = "diffusers"
    card.data.base_model = (source and id_of(source)) or card.data.base_model
    card.data.tags = list(dict.fromkeys([*(card.data.tags or ()), "machine-unlearning", "retrack_jax"]))
    card.text = card.text.rstrip() + ours
    return str(card)
