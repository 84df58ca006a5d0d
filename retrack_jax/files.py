"""Files that are whole or absent, caches of them under a key, and digests of what they hold.

Paths are `etils.epath` paths, so that a workdir may be a folder or a `gs://` address. A file is written under a temporary name in
the same folder and renamed. In an object store an object appears only when it is whole, so it is written directly.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import stat
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import psutil
from etils import epath

from retrack_jax.checks import UserError, check

_CHUNK = 1 << 22
_DAY_SECONDS = 86_400
_JSON_BYTES = 64 << 20
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
IN_WORKDIR = "choose another --workdir"  # what to do if a file cannot be written
IN_CACHE = "set config.data.cache_dir"
MAKE_AGAIN = "delete it, and the same command makes it again"
NUMBERS = object()  # in a shape (read_shaped): an object whose values are all numbers
Value = TypeVar("Value")
logger = logging.getLogger(__name__)


def write_whole(path, write: Callable[[epath.Path], None], *, advice: str = IN_WORKDIR) -> None:
    """Calls `write(temporary_path)`, then renames the result to `path`: a reader sees all of it or none.

    Args:
      write: writes it; it must catch any `OSError` of what it reads, which would be taken for an error of the disk written to.
      advice: how the user chooses another place.

    Raises:
      UserError: the disk is full or the folder cannot be written; an earlier file at `path` stays as it was.
    """
    path = epath.Path(path)
    temporary = path if "://" in str(path) else beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        if temporary != path:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; free some space or {advice}") from error
    finally:
        if temporary != path:
            with contextlib.suppress(NotADirectoryError):  # a file lies where its folder should be
                Path(temporary).unlink(missing_ok=True)


def make_folder(folder, *, advice: str = IN_WORKDIR) -> None:
    """Makes a folder and those above it, if they are not there. Raises `UserError` if it cannot be made."""
    try:
        epath.Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror or error}; {advice}") from error


def beside(path, ending: str = "tmp"):
    """Returns `.NAME.HOST.PID.ENDING` in the folder of `path`: a name that only this process uses, even on a shared disk."""
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.{ending}")


def sweep_temporaries(root: Path, untouched_seconds: float = 0.0) -> None:
    """Removes temporary files (`beside`) of processes that are gone, in `root` and two levels of folders below.

    This host cannot tell whether a process of another host is gone, so temporary files of those are removed after a day. Nor does
    it know the processes of a container that has its name: where nothing locks `root`, `untouched_seconds` keeps files that were
    written to within this time.
    """
    for path in (path for depth in ("", "*/", "*/*/") for path in root.glob(f"{depth}.*")):
        found = re.fullmatch(r"\..+\.([^.]+)\.(\d+)\.(tmp|old)", path.name)
        if not found:
            continue
        here = found[1] == _host()
        if here and psutil.pid_exists(int(found[2])):
            continue
        if _is_old(path, untouched_seconds if here else _DAY_SECONDS):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):  # gone meanwhile, or another user's
                    path.unlink()


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())


def _is_old(path: Path, seconds: float) -> bool:
    try:
        return time.time() - path.stat().st_mtime >= seconds
    except FileNotFoundError:  # its owner has renamed it meanwhile
        return False


def write_text(path, text: str, *, advice: str = IN_WORKDIR) -> None:
    """Writes `text` to `path`, whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_text(text), advice=advice)


def write_bytes(path, data: bytes) -> None:
    """Writes `data` to `path`, whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_bytes(data))


def write_json(path, value, *, advice: str = IN_WORKDIR) -> None:
    """Writes `value` as indented JSON, keys in the order they are given; refuses NaN, which JSON does not have."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, default=_plain) + "\n", advice=advice)


def open_regular(path) -> BinaryIO:
    """Returns the regular file at the local `path`, open for reading. Never waits for a FIFO's writer.

    Raises:
      UserError: nothing is there, a link leads nowhere, it is a folder, FIFO or device, a Git LFS pointer, or cannot be read.
    """
    try:
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    except FileNotFoundError as error:
        if os.path.islink(path):
            raise UserError(f"{path} is a link to {os.readlink(path)}, which is not there; restore that file") from error
        raise UserError(f"no file {path}; restore or download it") from error
    except IsADirectoryError as error:
        raise UserError(f"cannot read {path}: it is a folder, no regular file; put the file there") from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}; correct or replace it") from error
    problem = ""
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        problem = f"cannot read {path}: it is no regular file; put the file there"
    elif file.peek(len(_LFS_POINTER)).startswith(_LFS_POINTER):
        problem = f"{path} is a Git LFS pointer, not the file that it stands for; run `git lfs pull` in its folder"
    if problem:
        file.close()
        raise UserError(problem)
    return file


def check_regular(path) -> None:
    """Raises `UserError` as `open_regular` does."""
    open_regular(path).close()


def read_json(path):
    """Returns the JSON value in the file at `path`.

    Raises:
      UserError: as `open_regular`; the file is larger than 64 MB, is nested too deeply, or is not JSON in UTF-8.
    """
    try:
        with epath.Path(path).open("rb") if "://" in str(path) else open_regular(path) as file:
            data = file.read(_JSON_BYTES + 1)
    except FileNotFoundError as error:
        raise UserError(f"no file {path}") from error
    if len(data) > _JSON_BYTES:
        raise UserError(f"{path} is larger than {_JSON_BYTES >> 20} MB; expected a JSON file")
    try:
        return json.loads(data.decode())
    except RecursionError as error:
        raise UserError(f"{path} is not valid JSON (nested too deeply); restore or delete it") from error
    except ValueError as error:  # also not UTF-8, and a number of too many digits
        raise UserError(f"{path} is not valid JSON ({error}); restore or delete it") from error


def read_object(path) -> dict[str, Any]:
    """Returns the JSON object in a foreign file. Raises `UserError` as `read_json`, or if it is another value or no text."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; restore it")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # no library takes it, and it cannot be printed
        raise UserError(f"{path} holds half of a surrogate pair, which is no text; restore it") from error
    return value


def read_shaped(path, shape: Mapping):
    """Returns the JSON object in a file that an earlier command wrote, if it has the shape that this version writes.

    Args:
      shape: name -> the kind of its value: a type, several of them, another shape, or `NUMBERS`. The object may hold more.

    Raises:
      UserError: as `read_json`, or a name is missing or its value is of another kind.
    """
    value = read_json(path)
    if misfit := _misfit(value, shape, ""):
        raise UserError(f"{path} is damaged, or another version wrote it: {misfit}; {MAKE_AGAIN}")
    return value


def _misfit(value, shape, where: str) -> str:
    """Says where `value` is not as `shape` has it; empty if it is."""
    if shape is NUMBERS:
        shape = dict.fromkeys(value, (int, float)) if isinstance(value, dict) else dict
    if not isinstance(shape, Mapping):
        right = isinstance(value, shape) and not isinstance(value, bool)
        return "" if right else f"{where or 'the whole'} is {str(value)[:40]!r}"
    if not isinstance(value, dict):
        return f"{where or 'the whole'} is {str(value)[:40]!r}, no object"
    for name, kind in shape.items():
        inner = f"{where}.{name}".lstrip(".")
        if name not in value:
            return f"it has no {inner}"
        if misfit := _misfit(value[name], kind, inner):
            return misfit
    return ""


def read_npz(path, names: Sequence[str] | None = None, *, advice: str = MAKE_AGAIN) -> dict[str, np.ndarray]:
    """Returns name -> array of the `.npz` at `path`: all of them, or `names` alone.

    Raises:
      UserError: the file is missing, is damaged, lacks one of `names` or holds pickled objects; ends with `advice`.
    """
    try:
        with epath.Path(path).open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in (archive.files if names is None else names)}
    except FileNotFoundError as error:
        raise UserError(f"no file {path}") from error
    except Exception as error:  # zipfile, zlib and NumPy each raise their own
        raise UserError(f"{path} is damaged ({error}); {advice}") from error


def npz_rows(path) -> int:
    """Returns the length of the first array in the `.npz` at `path`, from its header alone; raises `UserError` as `read_npz`."""
    try:
        with epath.Path(path).open("rb") as file, zipfile.ZipFile(file) as archive, archive.open(archive.namelist()[0]) as member:
            return npy_header(member)[0][0]
    except Exception as error:  # zipfile, zlib and NumPy each raise their own
        raise UserError(f"{path} is damaged ({error}); {MAKE_AGAIN}") from error


def npy_header(stream) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Returns shape, whether the order is Fortran's, and dtype of the array that `stream` is about to read."""
    first = np.lib.format.read_magic(stream)[0] == 1
    return (np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0)(stream)


def write_npz(path, *, advice: str = IN_WORKDIR, **arrays) -> None:
    """Writes named arrays as a compressed `.npz`, whole or not at all."""

    def write(temporary):
        with temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)

    write_whole(path, write, advice=advice)


def cache_path(cache_dir, kind: str, key, ending: str) -> epath.Path:
    """Returns `cache_dir/kind/KEY.ending`, the file of what depends on the JSON value `key` and on nothing else."""
    return epath.Path(cache_dir).expanduser() / kind / f"{json_digest(key)[:32]}.{ending}"


def check_writable(folder, advice: str) -> None:
    """Raises `UserError` if this user may not write into a local folder, or not make it; nothing is written to find out."""
    if "://" in str(folder):
        return
    folder = Path(folder).expanduser().absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))  # False for another user's
    allowed = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    check(allowed, f"cannot write to {folder}: {there} is {'not writable' if there.is_dir() else 'no folder'}; {advice}")


def read_cached(path, read: Callable[..., Value]) -> Value | None:
    """Returns `read(path)`; None if there is no such file, or if it cannot be read: the caller then makes it again.

    Caches are written whole under a name that is their key, so what can be read is trusted.
    """
    if not epath.Path(path).exists():
        return None
    try:
        return read(path)
    except (UserError, OSError, EOFError, ValueError, KeyError, TypeError) as error:
        logger.warning("cannot read %s (%s); making it again", path, error)
        return None


def cached_array(path, make: Callable[[Path], None]) -> np.ndarray:
    """Returns the array in the `.npy` at `path`, mapped into memory; `make(temporary path)` writes it if it cannot be read."""

    def read(path) -> np.ndarray:
        return np.load(path, mmap_mode="r", allow_pickle=False)

    array = read_cached(path, read)
    if array is None:
        write_whole(path, make, advice=IN_CACHE)
        array = read(path)
    return array


def file_digest(path) -> str:
    """Returns the SHA-256 of the file at `path`, as 64 hexadecimal digits."""
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def array_digest(*arrays) -> str:
    """Returns the SHA-256 over the dtype, shape and bytes of `arrays`, read in blocks so that memory maps stay on disk."""
    sha = hashlib.sha256()
    for array in arrays:
        array = np.asanyarray(array)
        sha.update(f"{array.dtype.str}{array.shape}".encode())
        rows = max(1, _CHUNK // max(1, array[:1].nbytes)) if array.ndim else 1
        for start in range(0, len(array) if array.ndim else 1, rows):
            sha.update(np.ascontiguousarray(array[start : start + rows] if array.ndim else array).data)
    return sha.hexdigest()


def json_digest(value) -> str:
    """Returns the SHA-256 of `value` as canonical JSON (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain).encode()).hexdigest()


def _plain(value):
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not a JSON value")
