"""Success rate: does a k-means classifier call every sample of a prompt "not memorised"?

The official data ships the classifier as `kmeans_classifier.joblib`, a pickle, and loading a pickle can run any code that
its author wished. `read_centers` therefore walks the pickle with a reader that can make four harmless things: dtypes,
numeric scalars, plain arrays, and empty records that remember the attributes they are given. Anything else in the file is
refused by its name and nothing is ever called. Only the cluster centres are taken. Where there is no such file,
`centers_from_labels` refits them from the shipped labels: the centre of each cluster is the mean of its images, which is
what k-means converges to.

Equations:
1. cluster(x) = argmin_j ‖255 x - c_j‖², x in [0, 1] flattened with channels last (the official code; floats, not rounded).
2. success = 1 if cluster(x_i) = 0 for *all* samples of the prompt, else 0. Cluster 0 is the one that is not memorised.
"""

import bz2
import gzip
import lzma
import pickle
import zlib
from io import BytesIO

import numpy as np
from etils import epath

from retrack_jax.checks import UserError, check

_MAGIC = (
    (b"\x1f\x8b", gzip.decompress),
    (b"BZh", bz2.decompress),
    (b"\xfd7zXZ", lzma.decompress),
    (b"]\x00\x00", lzma.decompress),
)
_ZLIB_STARTS = (b"x\x01", b"x\x5e", b"x\x9c", b"x\xda")
_RECORD_MODULES = ("sklearn", "numpy.random", "scipy.sparse")


def read_centers(path) -> np.ndarray:
    """Returns float64 `[clusters, D]`, the centres in a joblib file of scikit-learn's `KMeans`, without unpickling it.

    Raises:
      UserError: the file is missing, is cut short, holds anything but a fitted `KMeans`, or asks to run code.
    """
    try:
        data = epath.Path(path).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"no file {path}; download the concept's folder") from error
    try:
        record = _Reader(BytesIO(_decompress(data))).load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"{path} is not a whole joblib file ({error}); download it again") from error
    name = getattr(record, "class_name", type(record).__name__)
    check(
        name.endswith(".KMeans") or name.endswith(".MiniBatchKMeans"),
        f"{path} holds a {name}; expected a scikit-learn KMeans",
    )
    centers = vars(record).get("cluster_centers_")
    check(
        isinstance(centers, np.ndarray) and centers.ndim == 2,
        f"{path} holds a KMeans without cluster centres; it was never fitted",
    )
    check(bool(np.isfinite(centers).all()), f"{path}: the cluster centres are not finite")
    return np.asarray(centers, np.float64)


def centers_from_labels(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns float64 `[2, D]`: the mean of the images labelled 0, then of those labelled 1, in [0, 255]. Raises if one is
    empty."""
    centers = []
    for label in (0, 1):
        members = np.flatnonzero(np.asarray(labels) == label)
        check(len(members) > 0, f"no image has label {label}; both clusters need images")
        total = np.zeros(images[0].size, np.float64)
        for index in members:  # one at a time: 512 x 512 x 3 float64 is 6 MB
            total += np.asarray(images[index], np.float64).reshape(-1)
        centers.append(total / len(members))
    return np.stack(centers)


def clusters(samples: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Returns int `[N]`, the nearest centre of each sample `[N, H, W, C]` in [0, 1] (equation 1). Raises if the sizes
    differ."""
    flat = np.asarray(samples).reshape(len(samples), -1)
    if flat.shape[1] != centers.shape[1]:
        raise UserError(
            f"samples have {flat.shape[1]} values but the k-means centres {centers.shape[1]}; both must be one image size"
        )
    distances = [np.square(255.0 * row.astype(np.float64) - centers).sum(axis=1) for row in flat]
    return np.argmin(np.stack(distances), axis=1) if distances else np.zeros(0, np.int64)


def success_rate(samples: np.ndarray, centers: np.ndarray) -> float:
    """Returns 1.0 if all samples `[N, H, W, C]` in [0, 1] fall into cluster 0, else 0.0 (equation 2). Raises for no samples."""
    check(len(samples) > 0, "success_rate needs at least one sample")
    return float(np.all(clusters(samples, centers) == 0))


def _decompress(data: bytes) -> bytes:
    for magic, decompress in _MAGIC:
        if data.startswith(magic):
            return decompress(data)
    return zlib.decompress(data) if data[:2] in _ZLIB_STARTS else data


class _Record:
    """An object of a class that is not loaded: it keeps the attributes of its pickled state and can do nothing."""

    class_name = "object"

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        if isinstance(state, dict):
            vars(self).update({key: value for key, value in state.items() if isinstance(key, str)})


class _ArrayHeader(_Record):
    """joblib's header of an array whose bytes follow it in the file."""

    class_name = "joblib.NumpyArrayWrapper"


def _scalar(dtype, data=b""):
    """A numeric scalar from its bytes; object dtypes are refused, they would be pickles themselves."""
    if not isinstance(dtype, np.dtype) or dtype.hasobject:
        raise UserError("a scalar of Python objects is inside; refused")
    return np.frombuffer(data, dtype, count=1)[0]


class _Reader(pickle._Unpickler):  # the Python implementation: its dispatch table can be extended
    """Reads a joblib pickle into records, arrays and numbers only."""

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, file):
        super().__init__(file)
        self._bytes_file = file

    def find_class(self, module, name):
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if (module, name) == ("numpy", "ndarray"):
            return type("ndarray", (_Record,), {"class_name": "numpy.ndarray"})
        if name == "scalar" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _scalar
        if (module, name) == ("joblib.numpy_pickle", "NumpyArrayWrapper"):
            return _ArrayHeader
        if any(module == allowed or module.startswith(allowed + ".") for allowed in _RECORD_MODULES):
            return type(name, (_Record,), {"class_name": f"{module}.{name}"})
        raise UserError(f"the pickle asks for {module}.{name}, which a k-means classifier does not need; it was not loaded")

    def load_build(self):
        super().load_build()
        if isinstance(self.stack[-1], _ArrayHeader):
            self.stack.append(self._read_array(vars(self.stack.pop())))

    dispatch[pickle.BUILD[0]] = load_build

    def _read_array(self, header: dict) -> np.ndarray:
        dtype, shape = header["dtype"], tuple(int(size) for size in header["shape"])
        if not isinstance(dtype, np.dtype) or dtype.hasobject:
            raise UserError("an array of Python objects is inside; refused")
        if header.get("numpy_array_alignment_bytes") is not None:
            self._bytes_file.read(int.from_bytes(self._bytes_file.read(1), "little"))
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        data = self._bytes_file.read(size)
        if len(data) != size:
            raise EOFError(f"an array of {size} bytes is cut after {len(data)}")
        array = np.frombuffer(data, dtype)
        return array.reshape(shape[::-1]).T if header.get("order") == "F" else array.reshape(shape)
