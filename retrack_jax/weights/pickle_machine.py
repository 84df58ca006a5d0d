"""A pickle machine that builds what one kind of file holds and nothing else.

Python's own unpickler calls whatever a file names. This one walks the opcodes with `pickletools.genops`, which executes nothing,
and acts on the few that tensors and fitted models need. A class or function in the stream is looked up in the table for its kind
of file (`Vocabulary`) and is never imported; the machine refuses anything else by name. So the worst that a hostile file can do
is to be refused.
"""

import dataclasses
import pickletools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from retrack_jax.checks import UserError

_MAX_OPCODES = 20_000_000
_MAX_DEPTH = 100  # of tuples in tuples, which Python hashes and prints by recursion
_MAX_COPIED = 50_000_000  # elements that calls copy: a list in the memo can be asked for any number of times
_MAX_KEY = 100  # values in a tuple that is a key, hashed again at every use

_MARK = object()
_NOTHING = ("PROTO", "FRAME", "STOP")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}
# The opcode's argument is the value; protocol 0's spellings are among them.
_VALUES = set(
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT UNICODE INT LONG FLOAT "
    "SHORT_BINBYTES BINBYTES SHORT_BINSTRING BINSTRING".split()
)


class Refused(Exception):
    """The pickle asks for something that its kind of file does not need; the message is what, without a sentence around it."""


@dataclasses.dataclass(frozen=True)
class Global:
    """A class or function that the stream names; nothing is imported for it."""

    module: str
    name: str


@dataclasses.dataclass
class Record:
    """An object of a class that is not loaded: its class name, constructor arguments and state."""

    class_name: str
    args: Any = ()
    state: Any = None


def set_state(target: Any, state: Any, stream: BinaryIO) -> Any:
    """Returns `target` with `state`; a dict's state is the `_metadata` of a state dict, which names no tensor, and is dropped."""
    if isinstance(target, Record):
        target.state = state
    elif type(target) is not dict:
        raise Refused(f"the state of a {type(target).__name__}")
    return target


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What one kind of file may name.

    Attributes:
      writer: what writes such files, for errors.
      functions: (module, name) -> what a call of it does here.
      names: (module, name) pairs that may be named but not called.
      records: modules, with all below them, whose classes and functions become a `Record` each.
      build: (object, its state, the stream behind the opcode) -> the object with its state.
      persistent: the object that a persistent id means; raises `Refused` for another.
    """

    writer: str
    functions: Mapping[tuple[str, str], Callable[..., Any]]
    names: frozenset[tuple[str, str]] = frozenset()
    records: tuple[str, ...] = ()
    build: Callable[[Any, Any, BinaryIO], Any] = set_state
    persistent: Callable[[Any], Any] | None = None

    def is_record(self, module: str) -> bool:
        """Returns whether objects of this module become a `Record`."""
        return any(module == prefix or module.startswith(prefix + ".") for prefix in self.records)


def load(stream: BinaryIO, where: str, vocabulary: Vocabulary) -> Any:
    """Returns the object of the next pickle in `stream`: plain containers and values, `Record`, what the vocabulary makes.

    Args:
      stream: read up to and including the pickle's STOP. Its `read` must not take memory for bytes that it does not have.
      where: what to call the file in errors.
      vocabulary: what the pickle may name.

    Raises:
      UserError: the pickle is damaged, or names anything that is not in the vocabulary.
    """
    machine = _Machine(stream, vocabulary)
    try:
        for count, (opcode, arg, _) in enumerate(pickletools.genops(stream)):
            if count > _MAX_OPCODES:
                raise UserError(f"{where}: its pickle is longer than any of {vocabulary.writer}; refused")
            machine.step(opcode.name, arg)
        (value,) = machine.stack
        return value
    except UserError:
        raise
    except Refused as error:
        raise UserError(
            f"{where}: its pickle asks for {str(error)[:300]}, which {vocabulary.writer} does not write; refused, and nothing of "
            "it was run"
        ) from error
    except (
        ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, EOFError, MemoryError, RecursionError
    ) as error:  # fmt: skip
        reason = f"{type(error).__name__}: {error}"[:300]
        raise UserError(f"{where}: its pickle is damaged ({reason}); download the file again") from error


class _Tuple(tuple):
    """A tuple that knows how deep tuples lie in it, 1 if there are none, and how many values are in all of them."""

    depth: int
    size: int

    def __new__(cls, items: tuple):
        inner = [item for item in items if type(item) is _Tuple]
        self = super().__new__(cls, items)
        self.depth = 1 + max((item.depth for item in inner), default=0)
        self.size = len(items) + sum(item.size for item in inner)
        if self.depth > _MAX_DEPTH:
            raise Refused(f"tuples {self.depth} deep")
        return self


def checked_key(key: Any) -> Any:
    """Returns a key of a dict. Raises `Refused` for one that costs much to hash or to print."""
    size = key.size if type(key) is _Tuple else key.bit_length() if type(key) is int else 0
    if size > _MAX_KEY:
        raise Refused(f"a key of {type(key).__name__.strip('_').lower()} with size {size}")
    return key


class _Machine:
    """The stack and the memo."""

    def __init__(self, stream: BinaryIO, vocabulary: Vocabulary):
        self.stream, self.vocabulary = stream, vocabulary
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0

    def step(self, name: str, arg: Any) -> None:
        """Acts on one opcode."""
        stack, memo = self.stack, self.memo
        if name in _VALUES:
            stack.append(arg)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _NOTHING:
            pass
        else:
            match name:
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_DICT":
                    stack.append({})
                case "TUPLE":
                    stack.append(_Tuple(tuple(self.pop_mark())))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    items = [stack.pop() for _ in range(int(name[-1]))]
                    stack.append(_Tuple(tuple(reversed(items))))
                case "LIST":
                    stack.append(self.pop_mark())
                case "DICT":
                    stack.append(_pairs(self.pop_mark()))
                case "APPEND":
                    value = stack.pop()
                    self.container(list).append(value)
                case "APPENDS":
                    values = self.pop_mark()
                    self.container(list).extend(values)
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    self.container(dict)[checked_key(key)] = value
                case "SETITEMS":
                    pairs = _pairs(self.pop_mark())
                    self.container(dict).update(pairs)
                case "POP":
                    stack.pop()
                case "DUP":
                    stack.append(stack[-1])
                case "BINPUT" | "LONG_BINPUT" | "PUT":
                    memo[arg] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET" | "GET":
                    stack.append(memo[arg])
                case "GLOBAL":
                    self.push_global(*arg.split(" ", 1))
                case "STACK_GLOBAL":
                    attribute, module = stack.pop(), stack.pop()
                    self.push_global(_of_type(module, str), _of_type(attribute, str))
                case "REDUCE":
                    args, function = stack.pop(), stack.pop()
                    stack.append(self.call(function, args))
                case "NEWOBJ":
                    args, cls = stack.pop(), stack.pop()
                    if not isinstance(cls, Global) or not self.vocabulary.is_record(cls.module):
                        raise Refused(f"an object of {cls}")
                    stack.append(Record(f"{cls.module}.{cls.name}", args))
                case "BUILD":
                    state = stack.pop()
                    stack[-1] = self.vocabulary.build(stack[-1], state, self.stream)
                case "BINPERSID" if self.vocabulary.persistent:
                    stack.append(self.vocabulary.persistent(stack.pop()))
                case _:
                    raise Refused(f"the opcode {name}")

    def pop_mark(self) -> list[Any]:
        """Returns what lies above the last mark, and takes both away."""
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is _MARK:
                items = self.stack[i + 1 :]
                del self.stack[i:]
                return items
        raise ValueError("no mark on the stack")

    def container(self, kind: type) -> Any:
        """Returns the list or dict on the stack. What is put into a record, whose class may be one, is lost."""
        return kind() if type(self.stack[-1]) is Record else _of_type(self.stack[-1], kind)

    def push_global(self, module: str, name: str) -> None:
        """Pushes a `Global` if the vocabulary has it."""
        known = (module, name) in self.vocabulary.functions or (module, name) in self.vocabulary.names
        if not known and not self.vocabulary.is_record(module):
            raise Refused(f"{module}.{name}")
        self.stack.append(Global(module, name))

    def call(self, function: Any, args: Any) -> Any:
        """Returns what the vocabulary says that a call gives."""
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise Refused("a call of what is no function")
        if self.vocabulary.is_record(function.module):
            return Record(f"{function.module}.{function.name}", args)
        if (function.module, function.name) not in self.vocabulary.functions:
            raise Refused(f"a call of {function.module}.{function.name}")
        self.copied += sum(len(arg) for arg in args if isinstance(arg, (tuple, list, dict)))
        if self.copied > _MAX_COPIED:
            raise Refused(f"copies of {self.copied} values")
        value = self.vocabulary.functions[function.module, function.name](*args)
        return _Tuple(value) if type(value) is tuple else value


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return {checked_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)}


def _of_type(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} where a {kind.__name__} should be")
    return value
