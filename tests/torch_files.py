"""Writes what `torch.save(state_dict)` writes, without PyTorch: a zip of one pickle and a record of bytes a tensor."""

import pickle
import zipfile

import numpy as np

from retrack_jax.weights.torch_reader import TorchFile

_STORAGES = {np.dtype(np.float32): "FloatStorage", np.dtype(np.float16): "HalfStorage", np.dtype(np.int64): "LongStorage"}


def read_torch(path) -> dict[str, np.ndarray]:
    """Returns all tensors of the file at `path` by name."""
    return dict(TorchFile(path))


def save_state(path, state) -> None:
    """Writes name -> array to `path`, readable by `torch.load` and by the restricted reader."""
    body = [b"\x80\x02}("]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for key, (name, value) in enumerate(state.items()):
            value = np.asarray(value, order="C")
            strides = tuple(stride // value.itemsize for stride in value.strides)
            kind = _global("torch", _STORAGES[value.dtype])
            storage = _tuple(_plain("storage"), kind, _plain(str(key)), _plain("cpu"), _plain(value.size)) + b"Q"
            hooks = _global("collections", "OrderedDict") + _tuple() + b"R"
            parts = (storage, _plain(0), _plain(value.shape), _plain(strides), _plain(False), hooks)
            body += [_plain(name), _global("torch._utils", "_rebuild_tensor_v2"), _tuple(*parts), b"R"]
            archive.writestr(f"archive/data/{key}", value.tobytes())
        archive.writestr("archive/data.pkl", b"".join([*body, b"u."]))


def _plain(value) -> bytes:
    return pickle.dumps(value, 2)[2:-1]  # without the protocol and the stop


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _tuple(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"
