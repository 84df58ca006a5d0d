"""Kernel distance between the features of two sets of images (KID).

Equations, for subsets of m rows x from the samples and y from the reference, D dimensions:
    (1)  k(a, b) = (a^T b / D + 1)^3
    (2)  MMD^2 = sum_{i != j} [k(x_i, x_j) + k(y_i, y_j)] / (m (m - 1)) - 2 sum_{i, j} k(x_i, y_j) / m^2
    (3)  KID = mean of (2) over random subsets                                             (Binkowski et al. 2018)

(2) is unbiased. Unlike FID, it does not grow if there are fewer images, and a value below 0 is noise around 0.
"""

from dataclasses import dataclass

import numpy as np

from retrack_jax.checks import check, check_int
from retrack_jax.metrics.arrays import check_features


@dataclass(frozen=True)
class Kid:
    """The mean and standard deviation over subsets of the squared distance, and how many subsets of how many rows.

    The deviation is None if each subset is the whole of a set: it would not show how much that set's choice matters.
    """

    mean: float
    std: float | None
    num_subsets: int
    subset_size: int


def kid(samples, reference, *, seed: int, num_subsets: int = 100, subset_size: int = 1000) -> Kid:
    """Returns the kernel distance (equation 3) of features `[N, D]` and `[M, D]`; defaults are torchmetrics' and
    torch-fidelity's.

    Args:
      samples, reference: features of generated and of real images, from the same network.
      seed: decides the subsets, each drawn without replacement.
      num_subsets, subset_size: a subset has fewer rows if a set has fewer, and the result says how many.

    Raises:
      UserError: NaN, fewer than two rows, or other dimensions.
    """
    samples, reference = check_features("samples' features", samples), check_features("reference features", reference)
    check_int("num_subsets", num_subsets, 1)
    check_int("subset_size", subset_size, 2)
    dim = samples.shape[1]
    check(dim == reference.shape[1], f"KID of {dim} against {reference.shape[1]} dimensions; use one feature network for both")
    size = min(subset_size, len(samples), len(reference))
    check(size >= 2, f"KID needs at least 2 images on each side, found {len(samples)} and {len(reference)}")
    order = np.random.default_rng(seed)
    # After this scaling, equation 1 is a product plus one. Products are float32, sums float64.
    samples, reference = (np.asarray(features, np.float32) / np.float32(np.sqrt(dim)) for features in (samples, reference))
    values = np.empty(num_subsets)
    for subset in range(num_subsets):
        x = samples[order.choice(len(samples), size, replace=False)]
        y = reference[order.choice(len(reference), size, replace=False)]
        within = _off_diagonal_sum(x) + _off_diagonal_sum(y)
        values[subset] = within / (size * (size - 1)) - 2.0 * _kernel(x, y).sum(dtype=np.float64) / size**2
    whole = size in (len(samples), len(reference))
    return Kid(float(values.mean()), None if whole else float(values.std()), num_subsets, size)


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    product = x @ y.T
    product += np.float32(1.0)
    return product * product * product


def _off_diagonal_sum(x: np.ndarray) -> float:
    kernel = _kernel(x, x)
    return float(kernel.sum(dtype=np.float64) - np.trace(kernel, dtype=np.float64))
