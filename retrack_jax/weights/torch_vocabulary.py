"""What a PyTorch checkpoint may hold: storages, tensors that view them, and the only calls that its pickle may ask for."""

import dataclasses
import math
from typing import Any

import ml_dtypes
import numpy as np

from retrack_jax.weights.pickle_machine import Global, Record, Refused, Vocabulary, checked_key

MAX_DIMENSIONS = 64  # PyTorch's own limit and NumPy's
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
        return math.prod(self.shape)

    @property
    def span(self) -> int:
        """Elements from the first to the last one, inclusive; 0 if there are none."""
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)) if self.numel else 0


def _storage(persistent_id: Any) -> Storage:
    if not isinstance(persistent_id, tuple) or len(persistent_id) not in (5, 6):
        raise Refused(f"a storage of a {type(persistent_id).__name__}")
    tag, kind, key, _, numel, *view = persistent_id
    if tag != "storage" or any(view) or not isinstance(kind, Global) or kind.name not in _DTYPES:
        raise Refused(f"a storage of {kind}, {view}")
    if not isinstance(key, str) or not _is_count(numel):
        raise ValueError(f"a storage with key {key!r} and {numel!r} values")
    return Storage(key, np.dtype(_DTYPES[kind.name]), numel)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _tensor(storage: Storage, offset: int, shape: tuple, strides: tuple, *_) -> Tensor:
    shape, strides = tuple(shape), tuple(strides)
    if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"a tensor with {len(shape)} sizes and {len(strides)} strides")
    if not isinstance(storage, Storage) or not all(_is_count(value) for value in (offset, *shape, *strides)):
        raise ValueError(f"a tensor of shape {shape}, strides {strides}")
    tensor = Tensor(storage, offset, shape, strides)
    if tensor.numel > storage.numel or offset + tensor.span > storage.numel:
        raise ValueError(f"a tensor of shape {shape} claims more than the {storage.numel} values of its storage")
    return tensor


def _dict(items: Any = ()) -> dict[Any, Any]:
    return {checked_key(key): value for key, value in (items.items() if isinstance(items, dict) else items)}


def _first(value: Any, *_) -> Any:
    return value


TORCH = Vocabulary(
    writer="torch.save",
    functions={
        ("collections", "OrderedDict"): _dict,
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
        # A NumPy scalar, such as the best loss so far in Lightning's checkpoints. Arrays are refused: they might be weights.
        **dict.fromkeys(
            (
                ("numpy", "dtype"),
                ("numpy.core.multiarray", "scalar"),
                ("numpy._core.multiarray", "scalar"),
                ("_codecs", "encode"),
            ),
            lambda *args: Record("a NumPy scalar", args),
        ),
    },
    names=frozenset(("torch", name) for name in _DTYPES),
    records=("__torch__", "pytorch_lightning", "lightning"),  # TorchScript's; what Lightning keeps of callbacks
    persistent=_storage,
)
