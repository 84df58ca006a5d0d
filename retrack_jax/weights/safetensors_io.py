"""Safetensors files, read and written one tensor at a time.

The format: an int64 count, that many bytes of JSON (name -> dtype, shape, [begin, end] behind the header), then the values. The
`safetensors` package maps a file or builds all of it in memory; here neither happens, so that reading a checkpoint costs its size
once and float16 files may double. The tests compare with the package.
"""

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

import ml_dtypes
import numpy as np
from etils import epath

from retrack_jax.checks import UserError
from retrack_jax.files import read_json
from retrack_jax.weights.names import TorchTensor

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # the limit of the safetensors package


class SafetensorsFile(Mapping[str, np.ndarray]):
    """The tensors of one file by name, read when asked for: `file[name]`, `file.shape(name)`.

    Raises:
      UserError: the file is missing, or its header does not describe it exactly.
    """

    def __init__(self, path):
        self._path = Path(path)
        try:
            size = self._path.stat().st_size
            with open(self._path, "rb") as file:
                start = file.read(8)
                length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
                if not 2 <= length <= min(_MAX_HEADER, size - 8):
                    raise self._damaged(f"a header of {length} bytes in a file of {size}")
                self._data = 8 + length
                header = json.loads(file.read(length))
        except FileNotFoundError as error:
            raise UserError(f"no file {path}") from error
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            if isinstance(error, UserError):
                raise
            raise self._damaged("its header is no JSON") from error
        if not isinstance(header, dict):
            raise self._damaged("its header is no object")
        self._tensors = {name: self._entry(name, entry) for name, entry in header.items() if name != "__metadata__"}
        end = 0
        for name, (_, _, begin, stop) in sorted(self._tensors.items(), key=lambda item: item[1][2:]):
            if begin != end:
                raise self._damaged(f"{name} begins at {begin}, the tensor before ends at {end}")
            end = stop
        if self._data + end != size:
            raise self._damaged(f"its header describes {self._data + end} bytes, it has {size}")

    def _damaged(self, reason: str) -> UserError:
        return UserError(f"{self._path} is a damaged safetensors file ({reason}); download it again")

    def _entry(self, name: str, entry) -> tuple[np.dtype, tuple[int, ...], int, int]:
        try:
            shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
            dtype = entry["dtype"]
            counts = all(type(value) is int and 0 <= value < 2**48 for value in (*shape, begin, end))
        except (TypeError, KeyError, ValueError) as error:
            raise self._damaged(f"the entry of {name}") from error
        if dtype not in _DTYPES:
            raise UserError(f"{self._path} holds {name} as {dtype!r}, which is not supported; choose one of {', '.join(_DTYPES)}")
        size = np.dtype(_DTYPES[dtype]).itemsize
        for value in shape if counts else ():
            size *= value
        if not counts or end - begin != size:
            raise self._damaged(f"{name} claims shape {list(shape)} and bytes {begin} to {end}")
        return np.dtype(_DTYPES[dtype]), shape, begin, end

    def __getitem__(self, name: str) -> np.ndarray:
        dtype, shape, begin, end = self._tensors[name]
        array = np.empty((end - begin) // dtype.itemsize, dtype)
        with open(self._path, "rb") as file:
            file.seek(self._data + begin)
            if file.readinto(array.view(np.uint8)) != array.nbytes:
                raise self._damaged(f"it ends within {name}")
        return array.reshape(shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor without reading it."""
        return self._tensors[name][1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class ShardedFile(Mapping[str, np.ndarray]):
    """The tensors of several files under one index, `{"weight_map": {name: file}}`; `open_shard` opens one of them.

    Raises:
      UserError: the index is damaged, names a file outside its folder, or does not say exactly what its files hold.
    """

    def __init__(self, index_path, open_shard: Callable[[Path], Mapping[str, np.ndarray]]):
        index_path = Path(index_path)
        index = read_json(index_path)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise UserError(f"{index_path} has no weight_map; download it again")
        shards = {}
        for file in sorted(set(weight_map.values())):
            if PurePosixPath(file).name != file or "\\" in file or file in ("", ".", ".."):
                raise UserError(f"{index_path} names the file {file!r}, which is outside its folder; refused")
            shards[file] = open_shard(index_path.parent / file)
        held = {name: file for file, shard in shards.items() for name in shard}
        if held != weight_map:
            different = sorted(name for name in held.keys() | weight_map.keys() if held.get(name) != weight_map.get(name))
            raise UserError(f"{index_path} and its files differ about {len(different)} tensors: {', '.join(different[:8])}")
        self._shards = {name: shards[file] for name, file in weight_map.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._shards[name][name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor without reading it."""
        return self._shards[name].shape(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)


def write_safetensors(path, tensors: Iterable[TorchTensor]) -> None:
    """Writes `tensors` to the new file `path`, one at a time, with the metadata `{"format": "pt"}` that diffusers wants."""
    tensors, header, end = list(tensors), {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        begin, end = end, end + int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize
        header[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values start at a multiple of 8
    with epath.Path(path).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            file.write(tensor.read().reshape(-1).view(np.uint8).data)
