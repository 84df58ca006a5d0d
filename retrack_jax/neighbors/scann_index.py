"""ScaNN's two engines behind one object: brute-force scoring, and a tree with quantised distances that can be saved.

ScaNN returns float32 distances and breaks ties as it likes. So more candidates than k are asked for, their distances are
taken from differences in float64, and they are sorted by (distance, index). With brute force the answer is then certified:
every image that was not returned lies beyond the last candidate, less the rounding error; where that does not settle the
k-th place, more are asked for.

The tree is approximate. How many of its leaves a query visits is chosen when it is built, by recall against the exact
search on images of the set; the recall that was found is kept with it.
"""

import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retrack_jax import files
from retrack_jax.checks import UserError
from retrack_jax.neighbors import exact
from retrack_jax.neighbors.exact import PIXEL_SCALE, UNIT_ROUNDOFF, as_float, difference_squares

_SPARE = 16  # candidates beyond k at the first try
_REORDER = 200  # of the tree's candidates, how many get true distances
_TUNE_QUERIES, _TUNE_K, _TUNE_RECALL = 400, 10, 0.99
_MANIFEST = "manifest.json"
logger = logging.getLogger(__name__)


class ScannIndex:
    """An index over all images of a set; images to leave out are named at query time.

    Attributes:
      recall: recall@10 that was measured when the index was built, the mean over queries (less two standard errors it is still
        0.99); 1 for brute force, which is certified.
    """

    def __init__(self, searcher, *, size: int, tree: bool, largest_norm: float, leaves: int = 0, recall: float = 1.0):
        self._searcher = searcher
        self._size = size
        self._largest_norm = largest_norm
        self._leaves = leaves
        self.tree = tree
        self.recall = recall

    @classmethod
    def build(cls, images_ND: np.ndarray, *, tree: bool = False) -> "ScannIndex":
        """Builds an index over uint8 pixels (as floats in [-1, 1]) or float32 rows [N, D]."""
        from scann import scann_ops_pybind

        floats_ND = as_float(images_ND)
        size, norm = len(floats_ND), _largest_norm(floats_ND)
        builder = scann_ops_pybind.builder(floats_ND, min(size, _TUNE_K), "squared_l2")
        if not tree:
            return cls(builder.score_brute_force().build(), size=size, tree=False, largest_norm=norm)
        all_leaves = num_leaves(size)
        builder = builder.tree(all_leaves, all_leaves, training_sample_size=min(size, 100_000))
        searcher = builder.score_ah(4 if floats_ND.shape[1] >= 256 else 2).reorder(_REORDER).build()
        index = cls(searcher, size=size, tree=True, largest_norm=norm, leaves=all_leaves)
        index._tune(images_ND)
        return index

    def _tune(self, images_ND: np.ndarray) -> None:
        """Takes the smallest number of leaves (in steps of 5/4) that finds enough of the true neighbors of images of the set."""
        rows = np.linspace(0, self._size - 1, min(self._size, _TUNE_QUERIES)).astype(np.int64)
        k = min(_TUNE_K, self._size - 1)
        own = [(np.array([query]), rows[query : query + 1]) for query in range(len(rows))]
        true_QK, _ = exact.search(images_ND[rows], images_ND, k, own)
        leaves = max(1, num_leaves(self._size) // 16)
        while True:
            self._leaves = min(leaves, num_leaves(self._size))
            found_QK, _ = self.search(images_ND[rows], images_ND, k, own)
            hits_Q = [len(set(found) & set(true)) / k for found, true in zip(found_QK.tolist(), true_QK.tolist(), strict=True)]
            self.recall = float(np.mean(hits_Q))
            # The mean of few queries is a guess: two standard errors less hold for the queries to come, too.
            surely = self.recall - 2 * float(np.std(hits_Q)) / len(hits_Q) ** 0.5
            if surely >= _TUNE_RECALL or self._leaves == num_leaves(self._size):
                break
            leaves = max(leaves + 1, leaves * 5 // 4)
        if surely < _TUNE_RECALL:
            less = "ScaNN tree: recall@%d is %.4f with every leaf, not surely %.2f; the backend exact misses none"
            logger.warning(less, k, self.recall, _TUNE_RECALL)
        logger.info("ScaNN tree: %d of %d leaves a query, recall@%d %.4f", self._leaves, num_leaves(self._size), k, self.recall)

    def save(self, folder) -> None:
        """Writes the index to `folder`, whole or not at all, with the SHA-256 of each of its files and of its manifest.

        Raises:
          UserError: it cannot be written.
        """
        folder = Path(folder)
        temporary = files.beside(folder)
        try:
            temporary.mkdir(parents=True)
            self._searcher.serialize(str(temporary), relative_path=True)
            manifest = {
                "size": self._size,
                "tree": self.tree,
                "largest_norm": self._largest_norm,
                "leaves": self._leaves,
                "recall": self.recall,
                "files": {path.name: files.file_digest(path) for path in sorted(temporary.iterdir())},
            }
            files.write_json(temporary / _MANIFEST, manifest | {"digest": files.json_digest(manifest)}, advice=files.IN_CACHE)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
        except (OSError, RuntimeError) as error:  # ScaNN's own files fail as RuntimeError
            raise UserError(f"cannot write {folder}: {error}; free some space or {files.IN_CACHE}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @classmethod
    def load(cls, folder, size: int) -> "ScannIndex | None":
        """Returns the index of `size` images that `save` wrote to `folder`, or None if there is none or it is damaged."""
        from scann import scann_ops_pybind

        folder = Path(folder)
        try:
            manifest = json.loads((folder / _MANIFEST).read_text())
            if manifest.pop("digest") != files.json_digest(manifest) or manifest["size"] != size:
                raise ValueError(f"{_MANIFEST} does not match its digest, or is of another number of images")
            if any(files.file_digest(folder / name) != digest for name, digest in manifest.pop("files").items()):
                raise ValueError("a file does not match its digest")
            return cls(scann_ops_pybind.load_searcher(str(folder)), **manifest)
        except FileNotFoundError as error:
            if not folder.exists():
                return None
            logger.warning("ScaNN index %s is damaged (%s); building it again", folder, error)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            logger.warning("ScaNN index %s is damaged (%s); building it again", folder, error)
        return None

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
                    raise UserError(
                        f"ScaNN found {len(found)} of {self._size} images when asked for all: one may hold NaN or infinity; "
                        "the backend exact names it"
                    )
                else:
                    unsettled.append(row)
            open_rows, spare = np.array(unsettled, np.int64), 4 * spare
        return indices_QK, np.sqrt(squares_QK)

    def _search_scann(self, floats_QD, count: int):
        """Up to `count` images a query, all of them if it is the size: lists of indices and rounded squared distances."""
        options = {}
        if self.tree:
            leaves = num_leaves(self._size) if count == self._size else self._leaves
            options = {"pre_reorder_num_neighbors": max(count, _REORDER), "leaves_to_search": leaves}
        found_QM, rough_QM = self._searcher.search_batched_parallel(floats_QD, final_num_neighbors=count, **options)
        kept = [np.isfinite(rough) for rough in rough_QM]  # a tree that finds fewer fills up with NaN
        found = [row[keep] for row, keep in zip(found_QM, kept, strict=True)]
        return found, [row[keep] for row, keep in zip(rough_QM, kept, strict=True)]


def num_leaves(size: int) -> int:
    """Half of ScaNN's guidance, the square root of the number of images: of what was tried, it reached the recall soonest."""
    return max(1, int(np.sqrt(size) / 2))


def _largest_norm(floats_ND: np.ndarray) -> float:
    """The largest Euclidean norm of a row, a block of rows at a time."""
    blocks = (floats_ND[start : start + 4096] for start in range(0, len(floats_ND), 4096))
    return float(max(np.sqrt(np.einsum("nd,nd->n", block, block, dtype=np.float64).max()) for block in blocks))
