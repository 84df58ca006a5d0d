"""Which rows are the same: 606 copies of an image are one query, and one row on the device."""

import hashlib

import numpy as np


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
