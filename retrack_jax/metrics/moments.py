"""Mean and covariance of features in float64, gathered part by part.

Equations, for two parts a and b with counts n, means m and scatter matrices M = sum_i (x_i - m)(x_i - m)^T:
    (1)  n = n_a + n_b,   d = m_b - m_a
    (2)  m = m_a + d n_b / n
    (3)  M = M_a + M_b + d d^T n_a n_b / n            (Chan, Golub and LeVeque 1983)
    (4)  covariance = M / (n - 1)

Each part is centered before its product: sum(x x^T) - n m m^T would lose digits by cancellation.
"""

import functools
from dataclasses import dataclass

import numpy as np

from retrack_jax.checks import UserError, check
from retrack_jax.metrics.arrays import check_features


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean `[D]` and scatter `[D, D]` of some rows, all float64."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    def merge(self, other: "Moments") -> "Moments":
        """Returns the moments of the rows of both (equations 1 to 3). Raises `UserError` for another D."""
        if len(self.mean) != len(other.mean):
            raise UserError(f"moments of {len(self.mean)} and {len(other.mean)} dimensions do not merge; use one feature network")
        count = self.count + other.count
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        scatter = self.scatter + other.scatter + np.outer(shift, shift) * (self.count * other.count / count)
        return Moments(count, mean, scatter)

    def compute(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the mean `[D]` and the covariance `[D, D]` (equation 4). Raises `UserError` below two rows."""
        check(self.count >= 2, f"a covariance needs at least 2 images, found {self.count}")
        return self.mean, self.scatter / (self.count - 1)


def moments_of(features, block: int = 4096) -> Moments:
    """Returns the moments of features `[N, D]`, `block` rows at a time so that the float64 copy stays small."""
    features = check_features("features", features)

    def of_block(start: int) -> Moments:
        rows = features[start : start + block].astype(np.float64)
        mean = rows.mean(axis=0)
        centered = rows - mean
        return Moments(len(rows), mean, centered.T @ centered)

    return functools.reduce(Moments.merge, map(of_block, range(0, len(features), block)))
