"""Precision and recall of samples by the manifold of nearest neighbors.

Equations, for features x of the samples and y of the reference. r_k(y_j) is the distance from y_j to the k-th nearest other row
of the reference:
    (1)  precision = #{i : ||x_i - y_j|| <= r_k(y_j) for some j} / N
    (2)  recall    = #{j : ||y_j - x_i|| <= r_k(x_i) for some i} / M                  (Kynkaanniemi et al. 2019, k = 3)

The paper takes features of VGG-16. Ours are those of the FID network, so compare only numbers of one network. Distances come from
float32 products of features that are centered on the mean of the reference: otherwise the expanded square would lose digits by
cancellation in clusters far from 0.
"""

from typing import NamedTuple

import numpy as np

from retrack_jax.checks import check, check_int
from retrack_jax.metrics.arrays import check_features

NEIGHBORS = 3  # k of the paper
_BLOCK = 2048


class PrecisionRecall(NamedTuple):
    """Both shares, in [0, 1]."""

    precision: float
    recall: float


def precision_recall(samples, reference, *, k: int = NEIGHBORS) -> PrecisionRecall:
    """Returns precision and recall (equations 1 and 2) of features `[N, D]` and `[M, D]` of one network.

    Equal N and M, both above k, make the two shares comparable. Raises `UserError` for NaN, too few rows, or other dimensions.
    """
    x, y = check_features("samples' features", samples), check_features("reference features", reference)
    check_int("k", k, 1)
    check(x.shape[1] == y.shape[1], f"features have {x.shape[1]} and {y.shape[1]} dimensions; use one feature network for both")
    fewest = min(len(x), len(y))
    check(fewest > k, f"precision and recall with k = {k} need more than {k} images on each side, found {fewest}")
    center = y.mean(axis=0, dtype=np.float64)
    x, y = ((features - center).astype(np.float32) for features in (x, y))
    x_sq, y_sq = (np.einsum("nd,nd->n", features, features) for features in (x, y))
    x_radius, y_radius = _radii(x, x_sq, k), _radii(y, y_sq, k)
    inside_reference = np.zeros(len(x), bool)
    inside_samples = np.zeros(len(y), bool)
    for start in range(0, len(x), _BLOCK):
        rows = slice(start, start + _BLOCK)
        distance = _squared_distances(x[rows], x_sq[rows], y, y_sq)
        inside_reference[rows] = (distance <= y_radius).any(axis=1)
        inside_samples |= (distance <= x_radius[rows, None]).any(axis=0)
    return PrecisionRecall(float(inside_reference.mean()), float(inside_samples.mean()))


def _squared_distances(a: np.ndarray, a_sq: np.ndarray, b: np.ndarray, b_sq: np.ndarray) -> np.ndarray:
    distance = a @ b.T
    distance *= np.float32(-2.0)
    distance += a_sq[:, None]
    distance += b_sq
    return distance


def _radii(x: np.ndarray, x_sq: np.ndarray, k: int) -> np.ndarray:
    """The squared distance of each row to its k-th nearest other row; a row's index, not distance 0, excludes the row itself."""
    radii = np.empty(len(x), np.float32)
    for start in range(0, len(x), _BLOCK):
        distance = _squared_distances(x[start : start + _BLOCK], x_sq[start : start + _BLOCK], x, x_sq)
        here = np.arange(len(distance))
        distance[here, start + here] = np.inf
        radii[start : start + _BLOCK] = np.partition(distance, k - 1, axis=1)[:, k - 1]
    return radii
