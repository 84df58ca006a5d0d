"""diffusers' checkpoints to Flax modules and parameters."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax.checks import UserError
from retrack_jax.files import read_json
from retrack_jax.models.unet2d import UNet2D
from retrack_jax.models.unet2d_condition import UNet2DCondition
from retrack_jax.notation import PyTree
from retrack_jax.weights.names import DIFFUSERS, RenameTable, from_torch
from retrack_jax.weights.safetensors_io import SafetensorsFile, ShardedFile
from retrack_jax.weights.torch_reader import TorchFile

UNET_FOLDERS = ("unet", "unet_ema")
_STEM = "diffusion_pytorch_model"
_CLASSES = {"UNet2DModel": UNet2D, "UNet2DConditionModel": UNet2DCondition}
_log = logging.getLogger(__name__)


def import_diffusers(path, **own_fields) -> tuple[UNet2D | UNet2DCondition, PyTree]:
    """Returns the module and the parameters (float32) of a UNet that diffusers saved, a `UNet2DModel` or `UNet2DConditionModel`.

    The second is called with a prompt's embedding besides, `module.apply(variables, x_t, t, prompt)`; `load_pipeline` reads a
    whole Stable Diffusion folder.

    Args:
      path: the model's folder (`config.json` and weights), or a folder that holds it as `unet` or `unet_ema`.
      own_fields: `dtype` and `remat` of the module.

    Raises:
      UserError: something is missing, not supported or does not fit; the message lists what, and nothing has been loaded.
    """
    folder = unet_folder(path)
    config = _read_config(folder)
    name = config.get("_class_name", "UNet2DModel")
    if name not in _CLASSES:
        raise UserError(f"{folder / 'config.json'} is of a {name}; only {' and '.join(_CLASSES)} are read here")
    module = _CLASSES[name].from_config(config, **own_fields)
    return module, load_params(module, folder, *unet_inputs(module))


def unet_inputs(module: UNet2D | UNet2DCondition) -> tuple[jax.Array, ...]:
    """Returns the smallest arguments that `module.init` takes: a noisy image, its timestep and, where it reads one, a prompt."""
    size = 2 ** (len(module.block_out_channels) - 1)
    inputs = jnp.zeros((1, size, size, module.in_channels)), jnp.zeros((1,), jnp.int32)
    return inputs if isinstance(module, UNet2D) else (*inputs, jnp.zeros((1, 1, module.cross_attention_dim)))


def load_params(module, folder, *inputs, stem: str = _STEM, table: RenameTable = DIFFUSERS) -> PyTree:
    """Returns the parameters of any module from the weights in `folder`.

    Args:
      module: a Linen module whose names follow `table`.
      folder: holds `stem`.safetensors or .bin, or one of these with an index.
      inputs: arguments for `module.init`, to learn its parameters' shapes; nothing is computed.
      stem: name of the weights without ending: `model` or `pytorch_model` for transformers' models.
      table: the spelling.

    Raises:
      UserError: as `import_diffusers`.
    """
    target = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    path, state = open_weights(folder, stem)
    return from_torch(state, target, table=table, where=str(path))


def open_weights(folder, stem: str = _STEM) -> tuple[Path, Mapping[str, np.ndarray]]:
    """Returns the path of the weights in `folder` and a mapping that reads them: safetensors before `.bin`, whole before sharded.

    Where there is only a variant (`stem.fp16.safetensors`), and only one, it is taken. Raises `UserError` where there is nothing,
    or a choice of variants.
    """
    folder = Path(folder)
    names = [f"{stem}{ending}" for ending in (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        variants = sorted(folder.glob(f"{stem}.*.safetensors")) or sorted(folder.glob(f"{stem}.*.bin"))
        if len(variants) > 1:
            choice = ", ".join(variant.name for variant in variants)
            raise UserError(f"{folder} holds only variants of the weights: {choice}; copy the one to read to {names[0]}")
        if not variants:
            raise UserError(f"no weights in {folder}: looked for {', '.join(names)}; give the folder that holds them")
        path = variants[0]
        _log.info("reading the variant %s", path)
    if path.name.endswith(".index.json"):
        return path, ShardedFile(path, SafetensorsFile if ".safetensors." in path.name else TorchFile)
    return path, SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def unet_folder(path) -> Path:
    """Returns the folder of the UNet's `config.json`: `path`/unet, `path`/unet_ema or `path`; else raises `UserError`."""
    path = Path(path).expanduser()
    found = [path / name for name in UNET_FOLDERS if (path / name / "config.json").is_file()]
    if len(found) > 1:
        _log.warning("%s holds %s; reading the first (give the other's path to read that)", path, " and ".join(map(str, found)))
    if not found and not (path / "config.json").is_file():
        where = "there" if path.is_dir() else "because there is no such folder"
        raise UserError(f"no config.json in {path}, its unet/ or its unet_ema/ ({where}); give a folder that diffusers saved")
    return found[0] if found else path


def read_schedule_config(path) -> dict[str, Any] | None:
    """Returns the noise schedule that belongs to a model as a dict for `Schedule.from_config`, or None if there is none.

    Looks for `scheduler/scheduler_config.json` and `scheduler_config.json` in `path` and, if that is the model's own folder
    inside a pipeline, beside it. Never reads a `scheduler.bin`: that is the state of a learning rate.
    """
    path = Path(path).expanduser()
    folders = [path]
    if not (path / "model_index.json").is_file() and (path / "config.json").is_file() and path.resolve().name in UNET_FOLDERS:
        folders.append(path.resolve().parent)
    for folder in folders:
        for file in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"):
            if file.is_file():
                return _object(read_json(file), file)
    return None


def _read_config(folder: Path) -> dict[str, Any]:
    return _object(read_json(folder / "config.json"), folder / "config.json")


def _object(value, file: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{file} holds no JSON object; restore it")
    return value
