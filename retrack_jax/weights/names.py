"""PyTorch's names and layouts to Flax's and back, for every network, with one table each.

Submodules carry the names that they have in PyTorch. This file is the only place that knows what differs:

    (1) an entry of a list:  PyTorch `resnets.0`, Flax `resnets_0`, for the list names in `RenameTable.lists`
    (2) a module:            as `RenameTable.modules` says, such as `trunk` for `backbone`
    (3) a leaf:              `weight` is `kernel` (convolution, linear), `scale` (norm) or `embedding`, `running_mean` is `mean`
                             and `running_var` is `var`; others are equal
    (4) its layout:          convolution [out, in, kh, kw] to [kh, kw, in, out]; linear [out, in] to [in, out]

The Flax tree is the reference: from its shapes follow the names and shapes that a file must have, exactly.
"""

import dataclasses
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
from flax import traverse_util

from retrack_jax.checks import UserError, shown
from retrack_jax.notation import PyTree

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "mean": "running_mean", "var": "running_var"}
_COUNTERS = (r"(.*\.)?num_batches_tracked", r"n_averaged")  # of batch normalization and torch.optim's averaged models
_log = logging.getLogger(__name__)


def new_attention_name(name: str) -> str:
    """Returns a parameter's name with the parts that diffusers' attention has had since version 0.14."""
    new = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return ".".join(new.get(part, part) for part in name.split("."))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RenameTable:
    """How one family of networks is spelled.

    Attributes:
      lists: names of PyTorch's ModuleLists, rule (1).
      modules: our name of a module -> PyTorch's, rule (2); an empty one drops the level.
      canonical: from a name in a file to the spelling that is expected; old spellings are read and never written.
      ignored: regular expressions of canonical names that are not read.
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
    modules: Mapping[str, str] = dataclasses.field(default_factory=dict)
    canonical: Callable[[str], str] = new_attention_name
    ignored: tuple[str, ...] = ()

    def torch_name(self, path: tuple[str, ...]) -> str:
        """Returns the PyTorch name of the Flax parameter at `path`, rules (1) to (3)."""
        pattern = rf"^({'|'.join(self.lists)})_(\d+)$"
        parts = [part for module in path[:-1] for part in re.sub(pattern, r"\1.\2", module).split(".")]
        parts = [self.modules.get(part, part) for part in parts]
        return ".".join(part for part in (*parts, _LEAVES.get(path[-1], path[-1])) if part)

    def is_ignored(self, name: str) -> bool:
        """Returns whether a canonical name is passed over: counters, and what `ignored` says."""
        return any(re.fullmatch(pattern, name) for pattern in (*_COUNTERS, *self.ignored))


DIFFUSERS = RenameTable()


def torch_axes(path: tuple[str, ...], ndim: int) -> tuple[int, ...]:
    """Returns the axes of the Flax parameter in PyTorch's order, rule (4): `flax.transpose(axes)` has PyTorch's layout."""
    if path[-1] == "kernel" and ndim == 4:
        return (3, 2, 0, 1)
    if path[-1] == "kernel" and ndim == 2:
        return (1, 0)
    return tuple(range(ndim))


def param_shapes(module, *inputs) -> PyTree:
    """Returns the tree of shapes of a Linen module's parameters; computes nothing. `inputs` are arguments of `module.init`."""
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def torch_shapes(target: PyTree, table: RenameTable = DIFFUSERS) -> dict[str, tuple[int, ...]]:
    """Returns PyTorch's name and shape of each parameter of `target`: what a file must hold."""
    flat = traverse_util.flatten_dict(target)
    return {
        table.torch_name(path): tuple(leaf.shape[axis] for axis in torch_axes(path, len(leaf.shape)))
        for path, leaf in flat.items()
    }


def from_torch(
    state: Mapping[str, np.ndarray],
    target: PyTree,
    *,
    table: RenameTable = DIFFUSERS,
    where: str = "the file",
    network: str = "the network",
    dtype: type | None = np.float32,
) -> PyTree:
    """Returns Flax parameters, NumPy arrays in the structure of `target`, from PyTorch's named tensors.

    If all names begin with the same parts (`module.`, `_orig_mod.`, `state_dict.`) that the network does not have, these are
    dropped.

    Args:
      state: name to array. A mapping that reads lazily may have `shape(name)`; then no tensor is read before all shapes are
        right, and one at a time.
      target: a tree of arrays or `jax.ShapeDtypeStruct`, as `param_shapes` returns it.
      table: the spelling.
      where: what to call the source in errors.
      network: what to call the network in errors.
      dtype: of the arrays; None: as each is stored.

    Raises:
      UserError: lists missing, surplus and mis-shaped tensors, and nothing has been read; or tensors with NaN or infinity.
    """
    expected = torch_shapes(target, table)
    names = [name for name in state if not table.is_ignored(name)]
    wrapper = _wrapper(names, expected)
    if wrapper:
        _log.info("%s: the names of its tensors are read without %r", where, wrapper)
    source: dict[str, str] = {}
    for name in names:
        canonical = table.canonical(name.removeprefix(wrapper))
        if table.is_ignored(canonical):
            continue
        if canonical in source:
            raise UserError(f"{where} holds {source[canonical]} and {name}, two spellings of one tensor; delete one of them")
        source[canonical] = name
    _check(source, expected, getattr(state, "shape", lambda name: np.shape(state[name])), where, network)

    params, bad = {}, []
    for path, leaf in traverse_util.flatten_dict(target).items():
        name = table.torch_name(path)
        axes = torch_axes(path, len(leaf.shape))
        with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinity, which is refused below
            params[path] = np.ascontiguousarray(np.asarray(state[source[name]]).transpose(np.argsort(axes)), dtype)
        if not np.isfinite(params[path]).all():
            bad.append(name)
    if bad:
        raise UserError(f"{where} holds NaN or infinity: {_listed('tensors', bad)}; use weights from before it diverged")
    return traverse_util.unflatten_dict(params)


def _wrapper(names: list[str], expected: Iterable[str]) -> str:
    """Returns the leading parts, with their dots, that all `names` share and none of `expected` begins with."""
    wrapper = ""
    while names:
        part, dot, _ = names[0].removeprefix(wrapper).partition(".")
        longer = wrapper + part + dot
        if not dot or not all(name.startswith(longer) for name in names) or any(name.startswith(part + dot) for name in expected):
            break
        wrapper = longer
    return wrapper


def _check(source: Mapping[str, str], expected: Mapping[str, tuple], shape_of: Callable, where: str, network: str) -> None:
    """Raises `UserError` unless `source` has the names and shapes of `expected`, and no others."""
    missing = [name for name in expected if name not in source]
    surplus = [name for name in source if name not in expected]
    wrong = []
    for name in expected.keys() & source.keys():
        if (shape := tuple(shape_of(source[name]))) != expected[name]:
            wrong.append(f"{name} {list(shape)} instead of {list(expected[name])}")
    if missing or surplus or wrong:
        kinds = (("missing", missing), ("surplus", surplus), ("mis-shaped", wrong))
        message = "; ".join(_listed(kind, names) for kind, names in kinds if names)
        some = next(iter(missing), "")
        levels = sorted({name.removesuffix(some) for name in surplus if name.endswith(f".{some}")}) if some else []
        hint = f"; it has the network's names behind {' and '.join(levels)}: save one of these alone" if levels else ""
        raise UserError(f"{where} does not fit {network}: {message}{hint}")


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
    return f"{len(names)} {kind}: {shown(sorted(names))}"
