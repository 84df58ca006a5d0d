"""Where a model lies in a folder: its config, its weights in one file or in shards, and its noise schedule.

This is the only place that knows the file names of diffusers and transformers. Where a folder holds weights more than once, the
file that those libraries would load is read and the log names the others.
"""

import logging
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from retrack_jax.checks import UserError
from retrack_jax.files import check_regular, file_digest, read_object
from retrack_jax.weights.file_tensors import FileTensors
from retrack_jax.weights.hub import local_model
from retrack_jax.weights.safetensors_io import SafetensorsFile
from retrack_jax.weights.torch_reader import TorchFile

NETWORK_FOLDERS = ("unet", "unet_ema", "transformer")  # of the network that denoises
AUTOENCODER_FOLDERS = ("vqvae", "vae", "vqgan", "movq")
# In the order in which the libraries look for them.
_STEM = "diffusion_pytorch_model"
DIFFUSERS_WEIGHTS = tuple(_STEM + ending for ending in (".safetensors.index.json", ".safetensors", ".bin", ".bin.index.json"))
TRANSFORMERS_WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"
)  # fmt: skip
_SCHEDULE = "scheduler_config.json"
_log = logging.getLogger(__name__)


def present(folder: Path, names: Iterable[str]) -> list[Path]:
    """Returns those of `names` that are in `folder`, in their order; a link that leads nowhere is there too."""
    return [path for path in (folder / name for name in names) if path.exists() or path.is_symlink()]


def find_weights(folder, names: tuple[str, ...] = DIFFUSERS_WEIGHTS) -> list[Path]:
    """Returns the files of the weights in `folder`: one file, or an index and the shards that it names; empty if there are none.

    If there is only a variant (`diffusion_pytorch_model.fp16.safetensors`, or shards of one), and only one, it is taken. Shards
    may be missing.

    Raises:
      UserError: there is a choice of variants, or the first file is no regular file, a Git LFS pointer or a damaged index.
    """
    folder = Path(folder)
    paths = present(folder, names)
    if paths:
        for other in paths[1:]:
            newer = other.exists() and paths[0].exists() and other.stat().st_mtime_ns > paths[0].stat().st_mtime_ns
            level, age = (logging.WARNING, "newer") if newer else (logging.INFO, "older")
            _log.log(level, "reading %s, as diffusers does, and not the %s %s", paths[0], age, other.name)
    else:
        paths = _variants(folder, names)
    if not paths:
        return []
    check_regular(paths[0])
    shards = sorted(set(_weight_map(paths[0]).values())) if _is_index(paths[0]) else []
    return [paths[0], *(folder / shard for shard in shards)]


def _variants(folder: Path, names: tuple[str, ...]) -> list[Path]:
    for ending in (".safetensors", ".bin"):
        stem = next(name for name in names if name.endswith(ending)).removesuffix(ending)
        files = [*folder.glob(f"{stem}.*{ending}"), *folder.glob(f"{stem}{ending}.index.*.json")]
        variants = [path for path in sorted(files) if "-of-" not in path.name]
        if len(variants) > 1:
            choice = ", ".join(variant.name for variant in variants)
            raise UserError(f"{folder} holds only variants of the weights: {choice}; copy the one to read to {stem}{ending}")
        if variants:
            _log.info("reading the variant %s", variants[0])
            return variants
    return []


def open_weights(folder, names: tuple[str, ...] = DIFFUSERS_WEIGHTS) -> tuple[Path, FileTensors]:
    """Returns the path of the weights in `folder` and a mapping that reads them one tensor at a time.

    Raises `UserError` as `find_weights` does, and if there are none or a file is missing or damaged.
    """
    files = find_weights(folder, names)
    if not files:
        raise UserError(f"no weights in {folder}: looked for {', '.join(names)}; give the folder that holds them")
    return files[0], ShardedFile(files[0]) if _is_index(files[0]) else open_file(files[0])


def open_file(path: Path) -> FileTensors:
    """Returns the tensors of one file by name, read when asked for: safetensors by its ending, else PyTorch's."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def weights_digest(folder, names: tuple[str, ...] = DIFFUSERS_WEIGHTS) -> str | list[str]:
    """Returns the SHA-256 of the weights file in `folder`, or of an index and of each shard that it names."""
    digests = [file_digest(path) for path in find_weights(folder, names)]
    return digests[0] if len(digests) == 1 else digests


def model_folder(path) -> Path:
    """Returns the folder of a network's `config.json`: one of `NETWORK_FOLDERS` in `path`, or `path`; else raises `UserError`.

    `path` may also be an id of the hub, whose files are then downloaded. If several are there, the first is taken and a warning
    says so.
    """
    given, path = path, local_model(path)
    folders = [path / name for name in NETWORK_FOLDERS if present(path / name, ["config.json"])]
    if len(folders) > 1:
        _log.warning("%s holds %s; reading the first (give another's path to read that)", path, " and ".join(map(str, folders)))
    if not folders and not present(path, ["config.json"]):
        raise UserError(_no_model(str(given), path))
    return folders[0] if folders else path


def _no_model(given: str, path: Path) -> str:
    if path.is_file():
        return f"{path} is a file; give the folder that holds it and the model's config.json"
    if "://" in given:
        return f"{given} is an address; give its name on the hub (org/name), or download it and give the folder"
    where = "there" if path.is_dir() else "because there is no such folder"
    return f"no config.json in {path}, its unet/, unet_ema/ or transformer/ ({where}); give a folder that diffusers saved"


def read_config(folder) -> dict[str, Any]:
    """Returns the `config.json` in `folder`. Raises `UserError` if it is missing, a Git LFS pointer, or no JSON object."""
    if not present(Path(folder), ["config.json"]):
        raise UserError(f"no config.json in {folder}; download the whole model")
    return read_object(Path(folder) / "config.json")


def schedule_places(path) -> list[Path]:
    """Returns where the noise schedule of the model at `path` may lie, in the order in which to look.

    In `path` itself. For a network's own folder, also in the pipeline around it. For a folder that holds one, as accelerate's
    `checkpoint-500/unet`, also one level up, where training scripts save the schedule.
    """
    path = local_model(path)
    places = [path / "scheduler" / _SCHEDULE, path / _SCHEDULE]
    folder = path.resolve()
    if (folder / "config.json").is_file() and folder.name in NETWORK_FOLDERS and not (folder / "model_index.json").is_file():
        folder = folder.parent
        places += [folder / "scheduler" / _SCHEDULE, folder / _SCHEDULE]
    holds_one = any((folder / name / "config.json").is_file() for name in NETWORK_FOLDERS)
    if holds_one and not (folder / "model_index.json").is_file():
        places.append(folder.parent / "scheduler" / _SCHEDULE)
    return places


class ShardedFile(FileTensors):
    """The tensors of several files under one index, `{"weight_map": {name: file}}`.

    Raises:
      UserError: the index is damaged, names a file outside its folder, or does not say exactly what its files hold.
    """

    def __init__(self, index_path: Path):
        weight_map = _weight_map(index_path)
        shards = {file: open_file(index_path.parent / file) for file in sorted(set(weight_map.values()))}
        held = {name: file for file, shard in shards.items() for name in shard}
        if held != weight_map:
            different = sorted(name for name in held.keys() | weight_map.keys() if held.get(name) != weight_map.get(name))
            names = ", ".join(different[:8])
            raise UserError(f"{index_path} and its files differ about {len(different)} tensors: {names}; download them again")
        self._shards = {name: shards[file] for name, file in weight_map.items()}
        super().__init__({name: shard.shape(name) for name, shard in self._shards.items()})

    def __getitem__(self, name: str) -> np.ndarray:
        return self._shards[name][name]


def _is_index(path: Path) -> bool:
    return ".index." in path.name and path.suffix == ".json"


def _weight_map(index_path: Path) -> dict[str, str]:
    weight_map = read_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index_path} has no weight_map; download it again")
    for file in sorted(set(weight_map.values())):
        if PurePosixPath(file).name != file or "\\" in file or file in ("", ".", "..") or not file.isprintable():
            raise UserError(f"{index_path} names the file {file!r}, which is outside its folder or no file's name; refused")
    return weight_map
