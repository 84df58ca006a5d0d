"""ScaNN's two engines: brute-force scoring, certified exact, and its tree, approximate.

ScaNN returns float32 distances and breaks ties as it likes. So it is asked for more than k candidates; their distances are
taken from differences in float64, and they are sorted by (distance, index). With brute force each answer is then certified:
every image that was not returned lies beyond the k-th place by more than ScaNN's rounding. A query that is not certified, or
whose k places the tree does not fill, is searched exactly.

The tree follows ScaNN's guidance (docs/algorithms.md in its repository): about sqrt(N) leaves, 5% of them searched,
asymmetric hashing of 2 values a block, 100 candidates rescored.
"""

from collections.abc import Sequence

import numpy as np

from retrack_jax.neighbors import exact
from retrack_jax.neighbors.exact import PIXEL_SCALE, UNIT_ROUNDOFF, as_float, difference_squares

_SPARE = 16  # candidates beyond k
_RESCORED = 100


def search(
    queries_QD, images_ND, k: int, exclude: Sequence[tuple[np.ndarray, np.ndarray]] = (), *, tree: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what `exact.search` does; approximate if `tree`."""
    from scann import scann_ops_pybind

    floats_ND, floats_QD = as_float(images_ND), as_float(queries_QD)
    size, dimension = floats_ND.shape
    count = min(size, k + _SPARE + max((len(indices) for _, indices in exclude), default=0))
    builder = scann_ops_pybind.builder(floats_ND, count, "squared_l2")
    if tree:
        leaves = max(1, int(np.sqrt(size)))
        builder = builder.tree(leaves, max(1, leaves // 20), training_sample_size=min(size, 250_000))
        builder = builder.score_ah(2).reorder(max(count, _RESCORED))
    else:
        builder = builder.score_brute_force()
    candidates_QM, rough_QM = builder.build().search_batched_parallel(floats_QD)
    # ScaNN's distance is off by at most this: a sum of D products in float32, in any order.
    norms_Q = np.linalg.norm(floats_QD.astype(np.float64), axis=1)
    error_Q = (dimension + 16) * UNIT_ROUNDOFF * (norms_Q + _largest_norm(floats_ND)) ** 2

    scale = PIXEL_SCALE if images_ND.dtype == np.uint8 else 1.0
    excluded_of = {row: indices for rows, indices in exclude for row in rows.tolist()}
    indices_QK, squares_QK = np.zeros((len(queries_QD), k), np.int64), np.zeros((len(queries_QD), k))
    unsettled = []
    for row, (candidates, rough) in enumerate(zip(candidates_QM, rough_QM, strict=True)):
        filled = np.isfinite(rough)  # a tree that finds fewer fills up with NaN
        allowed = candidates[filled & ~np.isin(candidates, excluded_of.get(row, ()))]
        squares = difference_squares(queries_QD[row : row + 1], images_ND, np.zeros(len(allowed), np.int64), allowed) * scale**2
        order = np.lexsort((allowed, squares))[:k]
        if len(order) == k and (tree or filled.sum() == size or squares[order[-1]] < rough[-1] - error_Q[row]):
            indices_QK[row], squares_QK[row] = allowed[order], squares[order]
        else:
            unsettled.append(row)
    distances_QK = np.sqrt(squares_QK)
    if unsettled:
        rows = np.array(unsettled)
        settled = exact.search(queries_QD[rows], images_ND, k, exact.part_of(exclude, rows))
        indices_QK[rows], distances_QK[rows] = settled
    return indices_QK, distances_QK


def _largest_norm(floats_ND: np.ndarray) -> float:
    """Returns the largest Euclidean norm of a row, a block of rows at a time."""
    blocks = (floats_ND[start : start + 4096] for start in range(0, len(floats_ND), 4096))
    return float(max(np.sqrt(np.einsum("nd,nd->n", block, block, dtype=np.float64).max()) for block in blocks))
