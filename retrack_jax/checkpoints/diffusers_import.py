"""diffusers' checkpoints to Flax modules and parameters."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax.checks import UserError
from retrack_jax.files import read_object
from retrack_jax.models.dit import DiT
from retrack_jax.models.mmdit import MMDiT
from retrack_jax.models.unet2d import UNet2D
from retrack_jax.models.unet2d_condition import UNet2DCondition
from retrack_jax.notation import PyTree
from retrack_jax.weights.folder import DIFFUSERS_WEIGHTS, model_folder, open_weights, read_config, schedule_places
from retrack_jax.weights.names import DIFFUSERS, RenameTable, from_torch, param_shapes

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of networks that diffusers saves.

    Attributes:
      module: a Linen module class with `from_config(config, **fields)` and `to_config()`.
      inputs: from a module to the smallest arguments that its `init` takes.
    """

    module: Any
    inputs: Callable[[Any], tuple[jax.Array, ...]]


def _smallest(module) -> tuple[jax.Array, ...]:
    """One image that is as small as the network takes, its time, and a condition."""
    size = module.patch_size if hasattr(module, "patch_size") else 2 ** (len(module.block_out_channels) - 1)
    condition = (module.smallest_condition,) if hasattr(module, "smallest_condition") else module.smallest_label
    return jnp.zeros((1, size, size, module.in_channels)), jnp.zeros((1,), jnp.int32), *condition


# By diffusers' `_class_name`. A new family is one record here and one module.
FAMILIES = {module.class_name: Family(module, _smallest) for module in (UNet2D, UNet2DCondition, DiT, MMDiT)}
FAMILIES["Transformer2DModel"] = FAMILIES["DiTTransformer2DModel"]  # its former name


def example_inputs(module) -> tuple[jax.Array, ...]:
    """Returns the smallest arguments that `module.init` takes: images, timesteps and, for a conditional network, a condition."""
    return next(family.inputs(module) for family in FAMILIES.values() if type(module) is family.module)


def import_diffusers(path, *, revision: str | None = None, **own_fields) -> tuple[UNet2D | UNet2DCondition | DiT | MMDiT, PyTree]:
    """Returns the module and the parameters (float32 NumPy arrays) of a network that diffusers saved, one of `FAMILIES`.

    A UNet2DCondition or an MMDiT also takes the embedding of a prompt: `module.apply(variables, x_t, t, prompt)`; `load_pipeline`
    reads a whole Stable Diffusion folder.

    Args:
      path: the model's folder (`config.json` and weights), or a folder that holds it as `unet` or `unet_ema`; or its id on the
        Hugging Face hub, `org/name`.
      revision: a branch, tag or commit of the model on the hub.
      own_fields: `dtype` and `remat` of the module.

    Raises:
      UserError: something is missing, not supported or does not fit; the message lists what, and nothing has been loaded.
    """
    folder = model_folder(f"{path}@{revision}" if revision else path)
    config = read_config(folder)
    name = config.get("_class_name", "UNet2DModel")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"{folder / 'config.json'} is of a {name}; only {', '.join(FAMILIES)} are read here")
    module = FAMILIES[name].module.from_config(config, **own_fields)
    return module, load_params(module, folder, *example_inputs(module))


def load_params(
    module,
    folder,
    *inputs,
    names: tuple[str, ...] = DIFFUSERS_WEIGHTS,
    table: RenameTable = DIFFUSERS,
    dtype: type | None = np.float32,
) -> PyTree:
    """Returns the parameters of a Linen module, NumPy arrays of `dtype` (None: as they are stored), from the weights in `folder`.

    `inputs` are arguments of `module.init`, to learn the parameters' shapes; nothing is computed. `names` are the file names that
    the weights may have, in the order in which to look. Names of parameters follow `table`. Raises `UserError` as
    `import_diffusers`.
    """
    path, state = open_weights(folder, names)
    return from_torch(state, param_shapes(module, *inputs), table=table, where=str(path), dtype=dtype)


def read_schedule_config(path) -> dict[str, Any] | None:
    """Returns the noise schedule that belongs to a model as a dict for `Schedule.from_config`, or None if there is none.

    Looks in `path` and, if that is a network's folder inside a pipeline or a training checkpoint, around it: see
    `schedule_places`. Never reads a `scheduler.bin`: that is the state of a learning rate.
    """
    file = next((place for place in schedule_places(path) if place.is_file() or place.is_symlink()), None)
    if file is None:
        return None
    _log.info("the noise schedule is %s", file)
    return read_object(file)
