"""Safetensors files, read and written one tensor at a time.

The `safetensors` package reads them: with `backend="pread"` it maps nothing and reads a tensor when asked for it, so reading a
checkpoint costs its size once. Its writer wants all tensors in memory; ours makes them one by one, so export needs no second
copy of the parameters. The format: an int64 count, that many bytes of JSON (name -> dtype, shape, [begin, end] behind the
header), then the values.
"""

import json
import struct
from collections.abc import Iterable, Mapping

import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from retrack_jax.checks import UserError
from retrack_jax.files import check_regular
from retrack_jax.weights.file_tensors import FileTensors
from retrack_jax.weights.names import TorchTensor
from retrack_jax.weights.torch_vocabulary import MAX_DIMENSIONS

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


class SafetensorsFile(FileTensors):
    """The tensors of one file.

    Raises:
      UserError: the file is missing, its header does not describe it exactly, or a dtype is not supported.
    """

    def __init__(self, path):
        self._path = path
        check_regular(path)
        try:
            self._file = safe_open(path, framework="numpy", backend="pread")
            slices = {name: self._file.get_slice(name) for name in self._file.keys()}
            self.metadata = self._file.metadata() or {}
        except (SafetensorError, OSError, ValueError) as error:
            raise self._damaged(error) from error
        super().__init__({name: tuple(part.get_shape()) for name, part in slices.items()})
        for name, part in slices.items():
            if (dtype := part.get_dtype()) not in _DTYPES:
                raise UserError(f"{path} holds {name} as {dtype}, which is not supported; save it as one of {', '.join(_DTYPES)}")
            if len(self._shapes[name]) > MAX_DIMENSIONS:
                raise self._damaged(f"{name} has {len(self._shapes[name])} dimensions")

    def _damaged(self, reason: object) -> UserError:
        return UserError(f"{self._path} is a damaged safetensors file ({str(reason)[:300]}); download it again")

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._shapes:
            raise KeyError(name)
        try:
            return self._file.get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise self._damaged(error) from error


def write_safetensors(path, tensors: Iterable[TorchTensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes `tensors` to the new file `path`, one at a time, with `metadata` and the `{"format": "pt"}` that diffusers wants."""
    tensors, header, end = list(tensors), {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
    for tensor in tensors:
        begin, end = end, end + int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize
        header[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values start at a multiple of 8
    with epath.Path(path).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            file.write(tensor.read().reshape(-1).view(np.uint8).data)
