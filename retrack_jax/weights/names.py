"""One rename table for both directions: PyTorch's names and layouts to Flax's and back.

Module names are diffusers' own. Three things differ, and this file is the only place that knows them:

    (1) an entry of a list:  PyTorch `resnets.0`, Flax `resnets_0`, for the list names in `RenameTable.lists`
    (2) a leaf:              `weight` is `kernel` (convolution, linear), `scale` (norm) or `embedding`; others keep theirs
    (3) its layout:          convolution [out, in, kh, kw] to [kh, kw, in, out]; linear [out, in] to [in, out]

The Flax tree is the reference: from its shapes follow the names and shapes that a file must have, exactly.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from retrack_jax.checks import UserError
from retrack_jax.notation import PyTree

_LISTED = 8  # names that an error spells out of each kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class RenameTable:
    """How one family of networks is spelt.

    Attributes:
      lists: names of PyTorch's ModuleLists, rule (1).
      aliases: (old, new) parts of a PyTorch name; the old spelling is read as the new one and never written.
      ignored: regular expressions of PyTorch names that hold no parameter, to be passed over when reading.
    """

    lists: tuple[str, ...] = (
        "down_blocks",
        "up_blocks",
        "resnets",
        "attentions",
        "downsamplers",
        "upsamplers",
        "to_out",
        "transformer_blocks",
        "net",
        "layers",
    )
    # Attention before diffusers 0.14.
    aliases: tuple[tuple[str, str], ...] = (
        ("query", "to_q"),
        ("key", "to_k"),
        ("value", "to_v"),
        ("proj_attn", "to_out.0"),
    )
    ignored: tuple[str, ...] = ()

    def torch_name(self, path: tuple[str, ...]) -> str:
        """Returns the PyTorch name of the Flax parameter at `path`, rules (1) and (2)."""
        parts = [re.sub(rf"^({'|'.join(self.lists)})_(\d+)$", r"\1.\2", part) for part in path[:-1]]
        leaf = "weight" if path[-1] in ("kernel", "scale", "embedding") else path[-1]
        return ".".join([*parts, leaf])

    def canonical(self, name: str) -> str:
        """Returns `name` with old spellings replaced by the new ones."""
        new = dict(self.aliases)
        return ".".join(new.get(part, part) for part in name.split("."))

    def is_ignored(self, name: str) -> bool:
        """Returns whether `name` matches one of `ignored`."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)


DIFFUSERS = RenameTable()


def torch_axes(path: tuple[str, ...], ndim: int) -> tuple[int, ...]:
    """Returns the axes of the Flax parameter in PyTorch's order, rule (3): `flax.transpose(axes)` has PyTorch's layout."""
    if path[-1] == "kernel" and ndim == 4:
        return (3, 2, 0, 1)
    if path[-1] == "kernel" and ndim == 2:
        return (1, 0)
    return tuple(range(ndim))


def from_torch(
    state: Mapping[str, np.ndarray], target: PyTree, *, table: RenameTable = DIFFUSERS, where: str = "the file"
) -> PyTree:
    """Returns Flax parameters, float32 arrays in the structure of `target`, from PyTorch's named tensors.

    Args:
      state: name to array. A mapping that reads lazily may have `shape(name)`; then no tensor is read before all shapes are
        right, and one at a time.
      target: a tree of arrays or `jax.ShapeDtypeStruct`, as `jax.eval_shape(module.init, ...)["params"]`.
      table: the spelling.
      where: what to call the source in errors.

    Raises:
      UserError: lists missing, surplus and mis-shaped tensors; nothing has been loaded then.
    """
    source = {}
    for name in state:
        if not table.is_ignored(name):
            if (new := table.canonical(name)) in source:
                raise UserError(f"{where} holds {source[new]} and {name}, two spellings of one tensor")
            source[new] = name
    shape_of = getattr(state, "shape", lambda name: np.shape(state[name]))
    flat = traverse_util.flatten_dict(target)
    expected = {table.torch_name(path): path for path in flat}
    missing = [name for name in expected if name not in source]
    surplus = [name for name in source if name not in expected]
    wrong = []
    for name in (name for name in expected if name in source):
        shape = flat[expected[name]].shape
        right = tuple(shape[axis] for axis in torch_axes(expected[name], len(shape)))
        if (found := tuple(shape_of(source[name]))) != right:
            wrong.append(f"{name} {list(found)} instead of {list(right)}")
    if missing or surplus or wrong:
        kinds = (("missing", missing), ("surplus", surplus), ("mis-shaped", wrong))
        raise UserError(f"{where} does not fit the network: {'; '.join(_listed(kind, names) for kind, names in kinds if names)}")

    params = {}
    for name, path in expected.items():
        axes = torch_axes(path, flat[path].ndim)
        array = np.asarray(state[source[name]]).transpose(np.argsort(axes))
        params[path] = jnp.asarray(np.ascontiguousarray(array, dtype=np.float32))
    return traverse_util.unflatten_dict(params)


class TorchTensor(NamedTuple):
    """A parameter as PyTorch names and lays it out; `read()` returns the C-contiguous array."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def to_torch(params: PyTree, *, table: RenameTable = DIFFUSERS) -> Iterator[TorchTensor]:
    """Yields the parameters, sorted by PyTorch's names; no array is copied before its `read()`."""
    flat = traverse_util.flatten_dict(params)
    for name, path in sorted((table.torch_name(path), path) for path in flat):
        leaf = flat[path]
        axes = torch_axes(path, leaf.ndim)

        def read(leaf=leaf, axes=axes) -> np.ndarray:
            return np.ascontiguousarray(np.asarray(leaf).transpose(axes))

        yield TorchTensor(name, np.dtype(leaf.dtype), tuple(leaf.shape[axis] for axis in axes), read)


def _listed(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} {kind}: {', '.join(sorted(names)[:_LISTED])}{more}"
