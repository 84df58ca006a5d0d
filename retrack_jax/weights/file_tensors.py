"""How files of weights are opened: regular files only, Git LFS pointers named as what they are; and their tensors by name."""

import os
import stat
from collections.abc import Iterator, Mapping
from typing import BinaryIO

import numpy as np

from retrack_jax.checks import UserError

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def open_regular(path) -> BinaryIO:
    """Returns the regular file at `path`, open for reading. Never waits for a FIFO's writer.

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
        raise UserError(f"cannot read {path}: it is a folder, no regular file; put the file of weights there") from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}; give a file of weights") from error
    problem = ""
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        problem = f"cannot read {path}: it is no regular file; put the file of weights there"
    elif file.peek(len(_LFS_POINTER)).startswith(_LFS_POINTER):
        problem = f"{path} is a Git LFS pointer, not the file that it stands for; run `git lfs pull` in its folder"
    if problem:
        file.close()
        raise UserError(problem)
    return file


def check_regular(path) -> None:
    """Raises `UserError` as `open_regular` does."""
    open_regular(path).close()


class FileTensors(Mapping[str, np.ndarray]):
    """Tensors by name; `file[name]`, which subclasses define, reads one, and `file.shape(name)` reads nothing."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        self._shapes = shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return self._shapes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
