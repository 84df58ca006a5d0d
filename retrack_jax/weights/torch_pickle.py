"""A pickle machine that can build tensors and nothing else.

Python's own unpickler calls whatever a file names. This one walks the opcodes with `pickletools.genops`, which executes nothing,
and acts on the few that `torch.save` and TorchScript write. A class or function in the stream is looked up in the tables of
`torch_values` and is never imported; what is not there is refused by name. So the worst that a hostile file can do is to be
refused.
"""

import pickletools
from typing import Any

from retrack_jax.checks import UserError
from retrack_jax.weights.torch_values import FUNCTIONS, Global, Record, is_known, is_script, make_storage

_MAX_OPCODES = 20_000_000
_MAX_DEPTH = 100  # of tuples in tuples, which Python hashes and prints by recursion
_MAX_COPIED = 50_000_000  # elements that calls copy: a list in the memo can be asked for any number of times


class _Mark:
    pass


class _Tuple(tuple):
    """A tuple with the depth of tuples in it, 1 where there is none."""

    depth: int

    def __new__(cls, items, depth: int):
        made = super().__new__(cls, items)
        made.depth = depth
        return made


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
    except (
        ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, EOFError, MemoryError, RecursionError
    ) as error:  # fmt: skip
        reason = f"{type(error).__name__}: {error}"[:300]
        raise UserError(f"{where}: its pickle is damaged ({reason}); download the file again") from error


class _Machine:
    """The stack and the memo; one method for each opcode that is allowed, with an underscore behind its name."""

    def __init__(self, where: str):
        self.where = where
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0

    def refuse(self, name: str) -> UserError:
        return UserError(
            f"{self.where}: its pickle asks for {name}, which is no tensor; refused, and nothing of it was run. "
            "If you trust the file, convert it to safetensors where it came from"
        )

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_tuple(self, items: tuple) -> None:
        """Pushes a tuple that knows how deep tuples lie in it."""
        depth = 1 + max((item.depth for item in items if type(item) is _Tuple), default=0)
        if depth > _MAX_DEPTH:
            raise UserError(f"{self.where}: its pickle has tuples {depth} deep, which torch.save does not write; refused")
        self.push(_Tuple(items, depth))

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
        self.push_tuple(tuple(self.pop_mark()))

    def list_(self, _):
        self.push(self.pop_mark())

    def dict_(self, _):
        items = self.pop_mark()
        self.push(dict(zip(items[::2], items[1::2], strict=True)))

    def tuple1_(self, _):
        self.push_tuple((self.stack.pop(),))

    def tuple2_(self, _):
        items = tuple(self.stack[-2:])
        del self.stack[-2:]
        self.push_tuple(items)

    def tuple3_(self, _):
        items = tuple(self.stack[-3:])
        del self.stack[-3:]
        self.push_tuple(items)

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
        if not is_known(module, name):
            raise self.refuse(f"{module}.{name}")
        self.push(Global(module, name))

    def reduce_(self, _):
        args, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise self.refuse("a call of what is no function")
        if is_script(function.module):
            self.push(Record(f"{function.module}.{function.name}", args))
            return
        if (function.module, function.name) not in FUNCTIONS:
            raise self.refuse(f"a call of {function.module}.{function.name}")
        self.copied += sum(len(arg) for arg in args if isinstance(arg, (tuple, list, dict)))
        if self.copied > _MAX_COPIED:
            raise UserError(f"{self.where}: its pickle copies more than any checkpoint's; refused")
        made = FUNCTIONS[function.module, function.name](*args)
        if type(made) is tuple:
            self.push_tuple(made)
        else:
            self.push(made)

    def newobj_(self, _):
        args, cls = self.stack.pop(), self.stack.pop()
        if not isinstance(cls, Global) or not is_script(cls.module):
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
        storage = make_storage(kind, key, numel) if tag == "storage" and not any(view) else None
        if storage is None:
            raise self.refuse(f"a storage of {kind}, {view}")
        self.push(storage)
