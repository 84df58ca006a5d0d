"""ScaNN's two engines behind one object: brute-force scoring and the tree index.

ScaNN returns float32 distances and breaks ties as it likes. So more candidates than k are asked for, their distances are taken
from differences in float64, and they are sorted by (distance, index). With brute force the answer is then certified: every image that
was not returned lies beyond the last candidate, less the rounding error; where that does not settle the k-th place, more are asked for.
"""

from collections.abc import Sequence

import numpy as np

from retrack_jax.neighbors.exact import PIXEL_SCALE, UNIT_ROUNDOFF, as_float, difference_squares

_SPARE = 16  # candidates beyond k at the first try
_REORDER = 200  # of the tree's candidates, how many get true distances


class ScannIndex:
    """An index over all images of a set; images to leave out are named at query time."""

    def __init__(self, searcher, size: int, tree: bool, largest_norm: float):
        self._searcher = searcher
        self._size = size
        self._largest_norm = largest_norm
        self.tree = tree

    @classmethod
    def build(cls, images_ND: np.ndarray, *, tree: bool = False) -> "ScannIndex":
        """Builds an index over uint8 pixels (as floats in [-1, 1]) or float32 rows [N, D]."""
        from scann import scann_ops_pybind

        floats_ND = as_float(images_ND)
        builder = scann_ops_pybind.builder(floats_ND, 10, "squared_l2")
        if tree:
            leaves = num_leaves(len(floats_ND))
            builder = builder.tree(leaves, max(1, leaves // 4), training_sample_size=min(len(floats_ND), 100_000))
            builder = builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(_REORDER)
        else:
            builder = builder.score_brute_force()
        return cls(builder.build(), len(floats_ND), tree, _largest_norm(floats_ND))

    def search(self, queries_QD, images_ND, k: int, exclude: Sequence[tuple[np.ndarray, np.ndarray]] = ()):
        """As `exact.search`, over the images that the index was built from; approximate if `tree`."""
        scale = PIXEL_SCALE if images_ND.dtype == np.uint8 else 1.0
        indices_QK = np.empty((len(queries_QD), k), np.int64)
        squares_QK = np.empty((len(queries_QD), k))
        excluded_of = dict.fromkeys(range(len(queries_QD)), np.empty(0, np.int64))
        for rows, indices in exclude:
            excluded_of.update(dict.fromkeys(rows.tolist(), indices))
        floats_QD = as_float(queries_QD)
        # ScaNN's distance is off by at most this: a sum of D products in float32, in any order.
        norms_Q = np.linalg.norm(floats_QD.astype(np.float64), axis=1)
        error_Q = (floats_QD.shape[1] + 16) * UNIT_ROUNDOFF * (norms_Q + self._largest_norm) ** 2
        spare = _SPARE + max((len(indices) for _, indices in exclude), default=0)
        open_rows = np.arange(len(queries_QD))
        while len(open_rows):
            count = min(self._size, k + spare)
            unsettled = []
            for row, found, rough in zip(open_rows, *self._search_scann(floats_QD[open_rows], count), strict=True):
                kept = found[~np.isin(found, excluded_of[int(row)])]
                pair_rows = np.zeros(len(kept), np.int64)
                squares = difference_squares(queries_QD[row : row + 1], images_ND, pair_rows, kept) * scale**2
                order = np.lexsort((kept, squares))[:k]
                enough = len(order) == k
                certain = enough and (self.tree or len(found) == self._size or squares[order[-1]] < rough[-1] - error_Q[row])
                if certain:
                    indices_QK[row], squares_QK[row] = kept[order], squares[order]
                elif count == self._size:
                    raise RuntimeError(f"ScaNN returned {len(found)} of {self._size} images when asked for all of them")
                else:
                    unsettled.append(row)
            open_rows, spare = np.array(unsettled, np.int64), 4 * spare
        return indices_QK, np.sqrt(squares_QK)

    def _search_scann(self, floats_QD, count: int):
        """(indices, rounded squared distances) of up to `count` images a query, as two lists of arrays; all of them if it is the size."""
        options = {"pre_reorder_num_neighbors": max(count, _REORDER)} if self.tree else {}
        if self.tree and count == self._size:
            options["leaves_to_search"] = num_leaves(self._size)
        found_QM, rough_QM = self._searcher.search_batched_parallel(floats_QD, final_num_neighbors=count, **options)
        kept = [np.isfinite(rough) for rough in rough_QM]  # a tree that finds fewer fills up with NaN
        return [row[k] for row, k in zip(found_QM, kept)], [row[k] for row, k in zip(rough_QM, kept)]


def num_leaves(size: int) -> int:
    """ScaNN's guidance: about the square root of the number of points."""
    return max(1, int(np.sqrt(size)))


def _largest_norm(floats_ND: np.ndarray) -> float:
    """The largest Euclidean norm of a row, a block of rows at a time."""
    blocks = (floats_ND[start : start + 4096] for start in range(0, len(floats_ND), 4096))
    return float(max(np.sqrt(np.einsum("nd,nd->n", block, block, dtype=np.float64).max()) for block in blocks))
