"""Which rows are the same: 606 copies of an image are one query, and one row on the device."""

import collections
import hashlib
import logging
from collections.abc import Callable

import numpy as np

log = logging.getLogger(__name__)
_BLOCK = 4096  # images whose lines are read at once


def distinct_rows(rows_FD: np.ndarray, kind_F: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns (int64 [Q], the first of each distinct row, in their order; int64 [F], which of them each row is).

    Rows are the same if all their bytes are, and their kind. Each row is read once and kept as its hash: `np.unique` over an
    axis makes a field of each of 196,608 values, a second for a single image.

    Args:
      rows_FD: [F, ...], of any dtype.
      kind_F: int [F], what else must be the same.
    """
    first: dict[tuple, int] = {}
    firsts, inverse_F = [], np.empty(len(rows_FD), np.int64)
    for row, values in enumerate(rows_FD):
        key = (_digest(values), 0 if kind_F is None else int(kind_F[row]))
        if key not in first:
            first[key] = len(firsts)
            firsts.append(row)
        inverse_F[row] = first[key]
    return np.array(firsts, np.int64), inverse_F


def distinct_neighbors(rows_FK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (the distinct rows [M], sorted; int32 [F, K], which of them each neighbor is): one copy of each on the device."""
    distinct_M, positions = np.unique(rows_FK, return_inverse=True)
    return distinct_M, positions.reshape(rows_FK.shape).astype(np.int32)


def copies_of(forget, images) -> dict[int, int]:
    """Returns row of `forget` -> the first row of `images` that is equal in every byte, for those that have one.

    Of each of `images` one line is read, and the whole of it only if that is a line of a forgotten image.

    Args:
      forget, images: `[F, ...]` and `[N, ...]`, arrays, memory maps or `RowView`s.
    """
    middle = images.shape[1] // 2
    lines = {image[middle].tobytes() for image in forget}
    rows = collections.defaultdict(list)
    for row, image in enumerate(forget):
        rows[_digest(image)].append(row)
    found: dict[int, int] = {}
    for start in range(0, len(images), _BLOCK):
        block = enumerate(images[start : start + _BLOCK, middle], start)
        for place in [place for place, line in block if line.tobytes() in lines]:
            found |= dict.fromkeys(rows.pop(_digest(images[place]), ()), place)
        if not rows:  # each has its copy
            break
    return found


def warn_of_copies(count: int, copies: dict[int, int], name: Callable[[int, int], str]) -> None:
    """Logs a warning if some of `count` forgotten images have a copy among the remaining ones, as `copies_of` finds them.

    ReTrack would lead such an image to itself, and the loss on remaining images preserves it. A copy that differs in a single
    value has the same effect and is not detected here; the report shows the neighbors with their distances.

    Args:
      name: (forgotten row, row of the copy) -> what to call the two.
    """
    if copies:
        which = f"{len(copies)} of {count} forgotten images have a copy among the remaining ones ({name(*min(copies.items()))})"
        log.warning("%s: a model continues to learn those; make every copy part of the target", which)


def _digest(values: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(values).data).digest()
