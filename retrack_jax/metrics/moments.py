"""Mean m and covariance of n features x_i in float64.

    (1)  M = sum_i (x_i - m)(x_i - m)^T
    (2)  covariance = M / (n - 1)

The features are centered before their product: sum(x x^T) - n m m^T would lose digits by cancellation.
"""

from dataclasses import dataclass

import numpy as np

from retrack_jax.checks import check
from retrack_jax.metrics.arrays import check_features


@dataclass(frozen=True, eq=False)
class Moments:
    """Count n, mean m `[D]` and scatter M `[D, D]` (equation 1) of some rows, float64."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    def compute(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the mean `[D]` and the covariance `[D, D]` (equation 2). Raises `UserError` below two rows."""
        check(self.count >= 2, f"a covariance needs at least 2 images, found {self.count}")
        return self.mean, self.scatter / (self.count - 1)


def moments_of(features, block: int = 4096) -> Moments:
    """Returns the moments of features `[N, D]`, `block` rows at a time so that the float64 copy stays small."""
    features = check_features("features", features)
    mean = features.mean(axis=0, dtype=np.float64)
    scatter = np.zeros((len(mean), len(mean)))
    for start in range(0, len(features), block):
        centered = features[start : start + block] - mean
        scatter += centered.T @ centered
    return Moments(len(features), mean, scatter)
