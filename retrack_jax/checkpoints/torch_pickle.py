"""A pickle machine that can build tensors and nothing else.

Python's own unpickler calls whatever a file names. This one walks the opcodes with `pickletools.genops`, which executes nothing,
and acts on the few that `torch.save` and TorchScript write. A class or function in the stream is looked up in a table of ours and
is never imported; what is not in the table is refused by name. So the worst that a hostile file can do is to be refused.
"""

import dataclasses
import pickletools
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from retrack_jax.checks import UserError

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
_MAX_OPCODES = 20_000_000


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
class _Global:
    """A class or function that the stream names; nothing is imported for it."""

    module: str
    name: str


class _Mark:
    pass


def load(stream, where: str) -> Any:
    """Returns the object of the next pickle in `stream`: plain containers and values, `Storage`, `Tensor`, `Record`.

    Args:
      stream: a binary file or BytesIO, read up to and including the pickle's STOP.
      where: what to call the file in errors.

    Raises:
      UserError: the pickle is damaged, or names anything that is not on the list.
    """
    machine = _Machine(where)
    try:
        for count, (opcode, arg, _) in enumerate(pickletools.genops(stream)):
            if count > _MAX_OPCODES:
                raise UserError(f"{where}: its pickle is longer than any checkpoint's; refused")
            action = getattr(machine, opcode.name.lower() + "_", None)
            if action is None:
                raise UserError(f"{where}: its pickle uses {opcode.name}, which torch.save does not write; refused")
            action(arg)
        (value,) = machine.stack
        return value
    except UserError:
        raise
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, EOFError, MemoryError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{where}: its pickle is damaged ({reason}); download the file again") from error


class _Machine:
    """The stack and the memo; one method for each opcode that is allowed, with an underscore behind its name."""

    def __init__(self, where: str):
        self.where = where
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def refuse(self, name: str) -> UserError:
        return UserError(
            f"{self.where}: its pickle asks for {name}, which is no tensor; refused, and nothing of it was run. "
            "If you trust the file, convert it to safetensors where it came from"
        )

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop_mark(self) -> list[Any]:
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is _Mark:
                items = self.stack[i + 1 :]
                del self.stack[i:]
                return items
        raise ValueError("no mark on the stack")

    # Values and containers.
    def proto_(self, _):
        pass

    frame_ = stop_ = proto_

    def none_(self, _):
        self.push(None)

    def newtrue_(self, _):
        self.push(True)

    def newfalse_(self, _):
        self.push(False)

    def binunicode_(self, value):
        self.push(value)

    short_binunicode_ = binunicode8_ = binint_ = binint1_ = binint2_ = long1_ = long4_ = binfloat_ = binunicode_
    # Protocol 0 spellings of the same, and bytes.
    unicode_ = int_ = long_ = float_ = short_binbytes_ = binbytes_ = short_binstring_ = binstring_ = binunicode_

    def mark_(self, _):
        self.push(_Mark)

    def empty_tuple_(self, _):
        self.push(())

    def empty_list_(self, _):
        self.push([])

    def empty_dict_(self, _):
        self.push({})

    def tuple_(self, _):
        self.push(tuple(self.pop_mark()))

    def list_(self, _):
        self.push(self.pop_mark())

    def dict_(self, _):
        items = self.pop_mark()
        self.push(dict(zip(items[::2], items[1::2], strict=True)))

    def tuple1_(self, _):
        self.stack[-1:] = [(self.stack[-1],)]

    def tuple2_(self, _):
        self.stack[-2:] = [tuple(self.stack[-2:])]

    def tuple3_(self, _):
        self.stack[-3:] = [tuple(self.stack[-3:])]

    def append_(self, _):
        value = self.stack.pop()
        self._list().append(value)

    def appends_(self, _):
        values = self.pop_mark()
        self._list().extend(values)

    def setitem_(self, _):
        value, key = self.stack.pop(), self.stack.pop()
        self._dict()[key] = value

    def setitems_(self, _):
        items = self.pop_mark()
        self._dict().update(zip(items[::2], items[1::2], strict=True))

    def _list(self) -> list:
        if type(self.stack[-1]) is not list:
            raise TypeError("append to what is no list")
        return self.stack[-1]

    def _dict(self) -> dict:
        if type(self.stack[-1]) is not dict:
            raise TypeError("set an item of what is no dict")
        return self.stack[-1]

    def pop_(self, _):
        self.stack.pop()

    def dup_(self, _):
        self.push(self.stack[-1])

    # Memo.
    def binput_(self, index):
        self.memo[index] = self.stack[-1]

    long_binput_ = put_ = binput_

    def memoize_(self, _):
        self.memo[len(self.memo)] = self.stack[-1]

    def binget_(self, index):
        self.push(self.memo[index])

    long_binget_ = get_ = binget_

    # Classes and functions: by name only.
    def global_(self, names):
        self._push_global(*names.split(" ", 1))

    def stack_global_(self, _):
        name, module = self.stack.pop(), self.stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise TypeError("a class whose name is no string")
        self._push_global(module, name)

    def _push_global(self, module: str, name: str) -> None:
        known = (module, name) in _FUNCTIONS or _is_storage(module, name) or _is_script(module, name)
        if not known:
            raise self.refuse(f"{module}.{name}")
        self.push(_Global(module, name))

    def reduce_(self, _):
        args, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Global) or not isinstance(args, tuple):
            raise self.refuse("a call of what is no function")
        if _is_script(function.module, function.name):
            self.push(Record(f"{function.module}.{function.name}", args))
            return
        if (function.module, function.name) not in _FUNCTIONS:
            raise self.refuse(f"a call of {function.module}.{function.name}")
        self.push(_FUNCTIONS[function.module, function.name](*args))

    def newobj_(self, _):
        args, cls = self.stack.pop(), self.stack.pop()
        if not isinstance(cls, _Global) or not _is_script(cls.module, cls.name):
            raise self.refuse(f"an object of {cls}")
        self.push(Record(f"{cls.module}.{cls.name}", args))

    def build_(self, _):
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif type(target) is not dict:  # A dict's state is the _metadata of a state dict, which names no tensor.
            raise self.refuse(f"the state of a {type(target).__name__}")

    def binpersid_(self, _):
        tag, kind, key, _, numel, *view = self.stack.pop()
        if tag != "storage" or not isinstance(kind, _Global) or kind.name not in _DTYPES or any(view):
            raise self.refuse(f"a storage of {kind}, {view}")
        if not isinstance(key, str) or not _is_count(numel):
            raise ValueError(f"a storage with key {key!r} and {numel!r} values")
        self.push(Storage(key, np.dtype(_DTYPES[kind.name]), numel))


def _is_storage(module: str, name: str) -> bool:
    return module == "torch" and name in _DTYPES


def _is_script(module: str, name: str) -> bool:
    return module == "__torch__" or module.startswith("__torch__.")


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


# The only calls that a file can ask for; none reaches outside this module.
_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
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
