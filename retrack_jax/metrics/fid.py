"""Fréchet distance between the features of two sets of images (FID).

Equations, with means m, covariances S (n - 1 in the denominator), and any root S = F F^T:
    (1)  FID = ||m_1 - m_2||^2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^(1/2)           (Heusel et al. 2017)
    (2)  tr (S_1 S_2)^(1/2) = sum of the singular values of F_1^T F_2

The eigenvalues of S_1 S_2 are the squared singular values of F_1^T F_2, so (2) needs no square root of a non-symmetric matrix.
With fewer images than dimensions, S_1 S_2 is singular: `sqrtm` would return complex or infinite values, while F merely has fewer
columns.
"""

import numpy as np

from retrack_jax.checks import check
from retrack_jax.metrics.moments import Moments


def fid(samples: Moments, reference: Moments) -> float:
    """Returns the Fréchet distance (equation 1) of two sets of features, in squared feature units.

    Both must be of one network and resize rule. Raises `UserError` for fewer than two images, or dimensions that differ.
    """
    check(
        len(samples.mean) == len(reference.mean),
        f"FID of {len(samples.mean)} against {len(reference.mean)} dimensions; use one feature network for both",
    )
    mean_1, cov_1 = samples.compute()
    mean_2, cov_2 = reference.compute()
    cross = trace_sqrt_product(cov_1, cov_2)
    shift = mean_1 - mean_2
    # For equal sets, rounding can give -1e-13; a distance is never negative.
    return float(max(shift @ shift + np.trace(cov_1) + np.trace(cov_2) - 2.0 * cross, 0.0))


def unstable_reason(num_samples: int, num_reference: int, num_features: int) -> str | None:
    """Returns why an FID of so many images is unstable, or None: a covariance of D dimensions needs more than D images."""
    fewest = min(num_samples, num_reference)
    if fewest > num_features:
        return None
    return (
        f"FID from {fewest} images has a singular {num_features}-dimensional covariance and is biased upward; "
        f"use more than {num_features} images, and compare only numbers that have the same number of images"
    )


def trace_sqrt_product(cov_1: np.ndarray, cov_2: np.ndarray) -> float:
    """Returns tr (S_1 S_2)^(1/2) of two covariances `[D, D]` (equation 2); exact for singular ones too."""
    from scipy.linalg import svdvals

    product = _root(cov_1).T @ _root(cov_2)
    return float(svdvals(product, check_finite=False).sum()) if product.size else 0.0


def _root(cov: np.ndarray) -> np.ndarray:
    """Returns F `[D, rank]` with F F^T = cov; eigenvalues below rounding (rank by the rule of `matrix_rank`) are left out."""
    from scipy.linalg import eigh

    values, vectors = eigh(cov, check_finite=False, driver="evd")
    kept = values > max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])
