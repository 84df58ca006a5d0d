"""PyTorch's files as NumPy arrays, without PyTorch and without running anything that a file holds.

Two containers. Since PyTorch 1.6 a zip, stored uncompressed: `NAME/data.pkl` and one record `NAME/data/KEY` for each storage;
TorchScript archives also have `NAME/constants.pkl`. Before, a sequence: three pickles of housekeeping, the pickle of the object,
the pickle of the list of keys, then for each key an int64 count and the values. `pickle_machine` reads the pickles. Tensors are
read one at a time from their place in the file, so reading takes little more memory than the arrays themselves.
"""

import dataclasses
import io
import os
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retrack_jax.checks import UserError
from retrack_jax.files import open_regular
from retrack_jax.weights import pickle_machine
from retrack_jax.weights.file_tensors import FileTensors
from retrack_jax.weights.pickle_machine import Record
from retrack_jax.weights.torch_vocabulary import TORCH, Tensor

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_NODES = 1_000_000  # values in one checkpoint; a few thousand are usual
_MAX_DEPTH = 64
_MAX_EXPANSION = 8  # bytes of all tensors over bytes of the file: tied weights repeat a storage, a hostile file too often


_Places = dict[str, tuple[int, int]]  # storage key -> offset and size in the file


class _Root(NamedTuple):
    """What one pickle holds: the first part of its tensors' names, the folder of their storages (each counts from 0)."""

    name: str
    folder: str
    value: Any


class TorchFile(FileTensors):
    """The tensors of a file that `torch.save` or TorchScript wrote.

    Dicts, lists and TorchScript objects inside each other give dotted names (`backbone.conv1.weight`); values that are no tensors
    are left out. A TorchScript module's own tensors are named as in its `state_dict()`, those of its table of constants
    `constants.0`, `constants.1`, ...; its code is never looked at. bfloat16 comes as `ml_dtypes.bfloat16`.

    Raises:
      UserError: the file is missing, damaged, or holds anything but tensors in plain containers; the message names what.
    """

    def __init__(self, path):
        self._path = Path(path)
        try:
            with open_regular(path) as file:
                self._size = os.fstat(file.fileno()).st_size
                is_zip = file.read(4) == b"PK\x03\x04"
                file.seek(0)
                # A zip finds its records by name and a sequence its storages by key; both become an offset in the file.
                read = _read_zip if is_zip else _read_sequence
                roots, self._places = read(file if is_zip else _Bounded(file, self._path, self._size), self._path)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}; download it again") from error
        self._tensors = _named_tensors(roots, str(path))
        super().__init__({name: tensor.shape for name, tensor in self._tensors.items()})
        total = sum(tensor.numel * tensor.storage.dtype.itemsize for tensor in self._tensors.values())
        if total > _MAX_EXPANSION * self._size:
            raise UserError(f"{path}: its tensors claim {total} bytes, the file has {self._size}; refused")
        for name, tensor in self._tensors.items():
            self._check_place(name, tensor)

    def _check_place(self, name: str, tensor: Tensor) -> None:
        storage = tensor.storage
        needed = storage.numel * storage.dtype.itemsize
        offset, size = self._places.get(storage.key, (0, 0))
        if needed != size or offset + size > self._size:
            raise UserError(
                f"{self._path}: {name} claims a storage of {needed} bytes where the file has {size}; download the file again"
            )

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        dtype = tensor.storage.dtype
        if not tensor.numel:
            return np.empty(tensor.shape, dtype)
        flat = np.empty(tensor.span, dtype)
        with open(self._path, "rb") as file:
            file.seek(self._places[tensor.storage.key][0] + tensor.offset * dtype.itemsize)
            if file.readinto(flat.view(np.uint8)) != flat.nbytes:
                raise UserError(f"{self._path} ends within {name}; download the file again")
        strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
        return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)


def _load(stream, where: str) -> Any:
    return pickle_machine.load(stream, where, TORCH)


def _read_zip(file, path: Path) -> tuple[list[_Root], _Places]:
    try:
        archive = zipfile.ZipFile(file)
        entries = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, EOFError, OverflowError, IndexError) as error:
        raise UserError(f"{path} is a damaged zip ({error}); download the file again") from error
    for name in entries:
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or ":" in name.split("/")[0]:
            raise UserError(f"{path} holds a record named {name!r}, which points outside the archive; refused")
    prefixes = [name.removesuffix("data.pkl") for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(prefixes) != 1:
        raise UserError(f"{path} is a zip but not of torch.save: it needs one NAME/data.pkl and has {len(prefixes)}")
    prefix = prefixes[0]
    if f"{prefix}byteorder" in entries:
        offset, size = _place(file, entries[f"{prefix}byteorder"], path)
        file.seek(offset)
        if file.read(min(size, 8)) != b"little":
            raise UserError(f"{path} was written on a big-endian machine, which is not supported; save it again on another")

    roots, places = [], {}
    for pickle, folder, root in (("data.pkl", "data/", ""), ("constants.pkl", "constants/", "constants")):
        if (info := entries.get(prefix + pickle)) is None:
            continue
        offset, size = _place(file, info, path)
        file.seek(offset)
        roots.append(_Root(root, folder, _load(io.BytesIO(file.read(size)), f"{path}, {info.filename}")))
        for name, info in entries.items():
            if name.startswith(prefix + folder) and not name.endswith("/"):
                places[folder + name.removeprefix(prefix + folder)] = _place(file, info, path)
    return roots, places


def _place(file, info: zipfile.ZipInfo, path: Path) -> tuple[int, int]:
    """Returns offset and size of a stored record; the local header has the true length of its padding."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
        raise UserError(
            f"{path} holds a compressed or encrypted record {info.filename}, which torch.save does not write; refused"
        )
    size = os.fstat(file.fileno()).st_size
    if not 0 <= info.header_offset <= size - 30:
        raise UserError(f"{path} has its record {info.filename} at byte {info.header_offset} of {size}; download the file again")
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) != 30 or header[:4] != b"PK\x03\x04":
        raise UserError(f"{path} has no record {info.filename} where its directory says; download the file again")
    offset = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    if not 0 <= info.file_size <= size - offset:
        raise UserError(f"{path} ends within its record {info.filename}; download the file again")
    return offset, info.file_size


def _read_sequence(file, path: Path) -> tuple[list[_Root], _Places]:
    if file.read(1) != b"\x80":
        raise UserError(f"{path} is no file of torch.save: it starts neither as a zip nor as a pickle")
    file.seek(0)
    magic = _load(file, str(path))
    protocol = _load(file, str(path)) if magic == _LEGACY_MAGIC else None
    if protocol != _LEGACY_PROTOCOL:
        raise UserError(f"{path} is a pickle but not of torch.save (no magic number); refused")
    system = _load(file, str(path))
    if isinstance(system, dict) and not system.get("little_endian", True):
        raise UserError(f"{path} was written on a big-endian machine, which is not supported; save it again on another")
    value = _load(file, str(path))
    keys = _load(file, str(path))
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise UserError(f"{path} has no list of storages behind its pickle; download the file again")
    roots = [_Root("", "", value)]
    itemsizes = {t.storage.key: t.storage.dtype.itemsize for t in _named_tensors(roots, str(path)).values()}
    places = {}
    for key in keys:
        count = file.read(8)
        if key not in itemsizes:
            raise UserError(f"{path} has a storage {key!r} that no tensor views, so its size is unknown; refused")
        size = struct.unpack("<q", count)[0] * itemsizes[key]
        if size < 0 or file.tell() + size > file.size:
            raise UserError(f"{path} ends within its storage {key!r} of {size} bytes; download the file again")
        places[key] = (file.tell(), size)
        file.seek(file.tell() + size)
    return roots, places


class _Bounded:
    """A file that refuses to read more bytes than it has left, before it makes room for them."""

    def __init__(self, file, path: Path, size: int):
        self._file, self._path, self.size = file, path, size
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int) -> bytes:
        if count < 0 or count > self.size - self._file.tell():
            raise UserError(f"{self._path} ends where {count} more bytes should follow; download the file again")
        return self._file.read(count)

    def readline(self) -> bytes:
        return self._file.readline(1 << 16)


def _named_tensors(roots: list[_Root], where: str) -> dict[str, Tensor]:
    """Returns every tensor under `roots` by its dotted name, its storage's key with the folder before it."""
    tensors: dict[str, Tensor] = {}
    nodes = 0
    for root in roots:
        stack = [((root.name,) if root.name else (), root.value)]
        while stack:
            parts, value = stack.pop()
            value = value.state if isinstance(value, Record) else value
            if isinstance(value, Tensor):
                storage = dataclasses.replace(value.storage, key=root.folder + value.storage.key)
                if (name := ".".join(parts)) in tensors:
                    raise UserError(f"{where} holds two tensors named {name}; refused")
                tensors[name] = dataclasses.replace(value, storage=storage)
            elif isinstance(value, (dict, list, tuple)):
                nodes += len(value)
                if nodes > _MAX_NODES or len(parts) > _MAX_DEPTH:
                    raise UserError(f"{where}: its containers are nested or repeated without end; refused")
                items = value.items() if isinstance(value, dict) else enumerate(value)
                # A stack returns the last item first; reversed here, names come in the file's order.
                stack += [((*parts, str(key)), item) for key, item in reversed(list(items))]
    return tensors
