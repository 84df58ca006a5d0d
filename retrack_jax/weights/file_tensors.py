"""What every reader of a weights file gives: its tensors by name, each read when asked for."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import numpy as np


class FileTensors(Mapping[str, np.ndarray]):
    """Tensors by name; `file[name]`, which subclasses define, reads one, and `file.shape(name)` reads nothing.

    Attributes:
      metadata: what the file says in addition to its tensors.
    """

    metadata: Mapping[str, str] = MappingProxyType({})

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        self._shapes = shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return self._shapes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


class Unwrapped(FileTensors):
    """The tensors of `file` whose names begin with `wrapper`, without it; all tensors, as they are named, if none does."""

    def __init__(self, file: FileTensors, wrapper: str):
        wrapped = {name.removeprefix(wrapper): name for name in file if name.startswith(wrapper)}
        self._file, self._names = file, wrapped or {name: name for name in file}
        self.metadata = file.metadata
        super().__init__({name: file.shape(held) for name, held in self._names.items()})

    def __getitem__(self, name: str) -> np.ndarray:
        return self._file[self._names[name]]
