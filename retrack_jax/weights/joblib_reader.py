"""A scikit-learn model that joblib wrote, as records and arrays, without running anything that the file holds.

joblib writes one pickle, whole or compressed. Arrays stand in it as a `NumpyArrayWrapper` whose bytes follow its BUILD opcode.
"""

import bz2
import io
import lzma
import re
import zlib
from typing import Any, BinaryIO

import numpy as np

from retrack_jax.checks import UserError
from retrack_jax.files import open_regular
from retrack_jax.weights.pickle_machine import Record, Refused, Vocabulary, load, set_state
from retrack_jax.weights.torch_vocabulary import MAX_DIMENSIONS

# A classifier of 1024 x 1024 pictures with two centers has 50 MB.
MAX_BYTES = 1 << 27
_DECOMPRESSORS = (
    ((b"\x1f\x8b", b"x\x01", b"x\x5e", b"x\x9c", b"x\xda"), lambda: zlib.decompressobj(zlib.MAX_WBITS | 32)),  # gzip and zlib
    ((b"BZh",), bz2.BZ2Decompressor),
    ((b"\xfd7zXZ", b"]\x00\x00"), lambda: lzma.LZMADecompressor(memlimit=MAX_BYTES)),
)
_WRAPPER = "joblib.numpy_pickle.NumpyArrayWrapper"


def read_joblib(path) -> Any:
    """Returns the object in a joblib file: a `Record` of its class whose `state` holds plain values, records and arrays.

    Raises:
      UserError: the file is missing, cut short, unpacks to more than 128 MiB, or holds anything but numbers in records.
    """
    file = open_regular(path)
    try:
        with file:
            data = _unpacked(file.read(MAX_BYTES + 1))
    except (OSError, zlib.error, lzma.LZMAError, EOFError, ValueError) as error:
        raise UserError(f"{path} is not a whole joblib file ({error}); download it again") from error
    if len(data) > MAX_BYTES:
        raise UserError(f"{path} unpacks to more than {MAX_BYTES >> 20} MiB, which no classifier needs; refused")
    return load(io.BytesIO(data), str(path), JOBLIB)


def _unpacked(data: bytes) -> bytes:
    """Returns what `data` unpacks to, or its first `MAX_BYTES + 1` bytes; takes no memory for the rest."""
    for starts, make in _DECOMPRESSORS:
        if data.startswith(starts):
            decompressor = make()
            unpacked = decompressor.decompress(data, MAX_BYTES + 1)
            if not decompressor.eof and len(unpacked) <= MAX_BYTES:
                raise EOFError("it ends within its compressed data")
            return unpacked
    return data


def _dtype(code: Any, *_) -> np.dtype:
    if not isinstance(code, str) or not re.fullmatch(r"[biuf]\d{1,2}", code):
        raise Refused(f"an array or a number of dtype {str(code)[:20]}")
    return np.dtype(code)


def _scalar(dtype: Any, data: Any) -> np.generic:
    if not isinstance(dtype, np.dtype) or not isinstance(data, bytes):
        raise ValueError("a number without dtype or bytes")
    return np.frombuffer(data, dtype, count=1)[0]


def _build(target: Any, state: Any, stream: BinaryIO) -> Any:
    """Gives a dtype its byte order, and reads the bytes of an array behind its header."""
    if isinstance(target, np.dtype):
        return target.newbyteorder(state[1] if state[1] in ("<", ">", "=", "|") else "=")
    set_state(target, state, stream)
    return _array(state, stream) if isinstance(target, Record) and target.class_name == _WRAPPER else target


def _array(header: dict, stream: BinaryIO) -> np.ndarray:
    dtype, shape = header["dtype"], tuple(header["shape"])
    if not isinstance(dtype, np.dtype) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"an array of {len(shape)} dimensions and dtype {dtype!r:.50}")
    size = dtype.itemsize
    for count in shape:
        if type(count) is not int or not 0 <= count < 2**48:
            raise ValueError(f"an array with the size {count!r:.50}")
        size *= count
    if header.get("numpy_array_alignment_bytes") is not None:
        stream.read(int.from_bytes(stream.read(1), "little"))
    data = stream.read(min(size, MAX_BYTES + 1))
    if len(data) != size:
        raise EOFError(f"an array of {size} bytes is cut after {len(data)}")
    array = np.frombuffer(data, dtype)
    return array.reshape(shape[::-1]).T if header.get("order") == "F" else array.reshape(shape)


JOBLIB = Vocabulary(
    writer="a k-means classifier in joblib",
    functions={
        ("numpy", "dtype"): _dtype,
        ("numpy.core.multiarray", "scalar"): _scalar,
        ("numpy._core.multiarray", "scalar"): _scalar,
    },
    names=frozenset({("numpy", "ndarray")}),
    records=("sklearn", "numpy.random", "scipy.sparse", "joblib.numpy_pickle"),
    build=_build,
)
