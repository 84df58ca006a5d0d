"""Frequency: the share of samples that are the forgotten image.

Equations:
    (1)  d_n = min_f ||sample_n - target_f||_2 over pixels in [0, 1]
    (2)  frequency = #{n : d_n < threshold} / N
    (3)  upper bound at 95% confidence (Clopper-Pearson, one-sided): the p at which P(X <= hits | N, p) = 0.05;
         for 0 hits it is 1 - 0.05^(1/N), 0.15% for 2,000 samples

The threshold belongs to the data set. It must lie between the memorized samples and the nearest other image: for the T-shirt
among MNIST's digits it is 10, and the nearest digit lies at 11.49. Samples are the sampler's floats, not rounded pixels.
"""

import numpy as np

from retrack_jax.checks import check, check_int
from retrack_jax.data.distinct import distinct_rows
from retrack_jax.metrics.arrays import unit_images


def target_distances(samples, targets) -> np.ndarray:
    """Returns the L2 distance of each sample to the nearest target (equation 1), float64 `[N]`, over pixels in [0, 1].

    Args:
      samples: `[N, H, W, C]`, floats in [0, 1] or uint8 (divided by 255).
      targets: `[F, H, W, C]` or `[H, W, C]`, the forgotten images, alike.

    Raises:
      UserError: NaN in samples, or shapes that differ.
    """
    samples = unit_images("samples", samples)
    targets = np.asarray(targets)
    targets = unit_images("targets", targets[None] if targets.ndim == 3 else targets)
    check(
        samples.shape[1:] == targets.shape[1:],
        f"samples are {samples.shape[1:]} and targets {targets.shape[1:]}; both must have the same size and channels",
    )
    # A group's copies are one image: compare with each distinct target once.
    targets = targets.reshape(len(targets), -1)
    targets = targets[distinct_rows(targets)[0]]
    flat = samples.reshape(len(samples), -1)
    nearest = np.full(len(flat), np.inf)
    for target in targets:
        for start in range(0, len(flat), 1024):
            block = flat[start : start + 1024].astype(np.float64) - target.astype(np.float64)
            distance = np.sqrt(np.einsum("nd,nd->n", block, block))
            np.minimum(nearest[start : start + 1024], distance, out=nearest[start : start + 1024])
    return nearest


def frequency_upper_bound(hits: int, num_samples: int) -> float:
    """Returns the largest true frequency that `hits` of `num_samples` leaves plausible (equation 3), in [0, 1]."""
    from scipy.stats import beta

    check_int("num_samples", num_samples, 1)
    check_int("hits", hits, 0, num_samples)
    return 1.0 if hits == num_samples else float(beta.ppf(0.95, hits + 1, num_samples - hits))
