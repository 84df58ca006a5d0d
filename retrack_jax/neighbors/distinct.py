"""Which rows are the same: 606 copies of an image are one query, and one row on the device."""

import hashlib
import logging
from collections.abc import Callable

import numpy as np

log = logging.getLogger(__name__)


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
        digest = hashlib.sha256(np.ascontiguousarray(values).data).digest()
        key = (digest, 0 if kind_F is None else int(kind_F[row]))
        if key not in first:
            first[key] = len(firsts)
            firsts.append(row)
        inverse_F[row] = first[key]
    return np.array(firsts, np.int64), inverse_F


def distinct_neighbors(rows_FK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (the distinct rows [M], sorted; int32 [F, K], which of them each neighbor is): one copy of each on the device."""
    distinct_M, positions = np.unique(rows_FK, return_inverse=True)
    return distinct_M, positions.reshape(rows_FK.shape).astype(np.int32)


def warn_of_copies(forget: np.ndarray, nearest: np.ndarray, name: Callable[[int], str]) -> None:
    """Logs a warning if some forgotten images `[F, ...]` equal their nearest remaining image, the same row of `nearest`.

    ReTrack would lead such an image to itself, and the loss on remaining images preserves it. A copy that differs in a single
    value has the same effect and is not detected here; the report shows the neighbors with their distances.

    Args:
      name: row -> what to call that forgotten image and its copy.
    """
    copied = [row for row, (one, other) in enumerate(zip(forget, nearest, strict=True)) if np.array_equal(one, other)]
    if copied:
        which = f"{len(copied)} of {len(forget)} forgotten images have a copy among the remaining ones ({name(copied[0])})"
        log.warning("%s: a model continues to learn those; make every copy part of the target", which)
