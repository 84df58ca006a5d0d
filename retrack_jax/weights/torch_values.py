"""What a PyTorch checkpoint may hold, and the only classes and calls that one may name.

Nothing here is looked up by a name out of a file but in the tables of this module, and no function of theirs reaches outside it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

_DTYPES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


@dataclasses.dataclass(frozen=True)
class Storage:
    """A block of `numel` values that tensors view; its bytes are elsewhere in the file, under `key`."""

    key: str
    dtype: np.dtype
    numel: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A strided view of a storage: offset, shape and strides in elements. It fits inside the storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def span(self) -> int:
        """Elements from the first to the last one, inclusive; 0 if there are none."""
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)) if self.numel else 0


@dataclasses.dataclass
class Record:
    """An object of a TorchScript class, opaque: its class name and its attributes."""

    class_name: str
    state: Any = None


@dataclasses.dataclass(frozen=True)
class Global:
    """A class or function that the stream names; nothing is imported for it."""

    module: str
    name: str


def is_script(module: str) -> bool:
    """Whether this module holds TorchScript classes, whose objects become a `Record` each."""
    return module == "__torch__" or module.startswith("__torch__.")


def is_known(module: str, name: str) -> bool:
    """Whether a file may name this at all."""
    return (module, name) in FUNCTIONS or (module == "torch" and name in _DTYPES) or is_script(module)


def make_storage(kind: Any, key: Any, numel: Any) -> Storage | None:
    """Returns the storage of class `kind`, or None if that is no class of storages; raises `ValueError` for a lie about it."""
    if not isinstance(kind, Global) or kind.name not in _DTYPES:
        return None
    if not isinstance(key, str) or not _is_count(numel):
        raise ValueError(f"a storage with key {key!r} and {numel!r} values")
    return Storage(key, np.dtype(_DTYPES[kind.name]), numel)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _tensor(storage: Storage, offset: int, shape: tuple, strides: tuple, *_) -> Tensor:
    shape, strides = tuple(shape), tuple(strides)
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or len(shape) != len(strides) or not all(_is_count(value) for value in numbers):
        raise ValueError(f"a tensor of shape {shape}, strides {strides}")
    tensor = Tensor(storage, offset, shape, strides)
    if tensor.numel > storage.numel or offset + tensor.span > storage.numel:
        raise ValueError(f"a tensor of shape {shape} claims more than the {storage.numel} values of its storage")
    return tensor


def _first(value: Any, *_) -> Any:
    return value


# The only calls that a file can ask for.
FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): lambda items=(): dict(items),
    ("torch", "Size"): lambda items=(): tuple(items),
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch.jit._pickle", "build_intlist"): _first,
    ("torch.jit._pickle", "build_doublelist"): _first,
    ("torch.jit._pickle", "build_boollist"): _first,
    ("torch.jit._pickle", "build_tensorlist"): _first,
    ("torch.jit._pickle", "restore_type_tag"): _first,
}
