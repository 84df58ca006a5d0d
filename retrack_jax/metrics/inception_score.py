"""Inception score: how sure a classifier is of each image, and how varied the classes are.

Equations, for class probabilities p(y | x_i) of the N images of one split:
    (1)  p(y) = mean_i p(y | x_i)
    (2)  score = exp( mean_i KL(p(y | x_i) || p(y)) )                                        (Salimans et al. 2016)

Published numbers are the mean over 10 splits after a random permutation. The logits of the FID network are taken without the
bias. Splits are as even as can be; torchmetrics, and so the official code, cuts N images into parts of ceil(N / 10).
"""

import logging
from dataclasses import dataclass

import numpy as np

from retrack_jax.checks import check, check_int
from retrack_jax.metrics.arrays import check_features

OFFICIAL = "inception_score_official"  # the metric whose network is in training mode, as the official code leaves it
NUM_SPLITS = 10
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InceptionScore:
    """The mean and standard deviation (divided by the number of splits) of the score; it lies in [1, number of classes]."""

    mean: float
    std: float
    num_splits: int


def inception_score(logits, *, seed: int, num_splits: int = NUM_SPLITS, official: bool = False) -> InceptionScore:
    """Returns the inception score of images from their logits `[N, classes]`.

    `seed` decides the permutation; each of the `num_splits` parts is scored by itself (equation 2). `official` cuts as
    torchmetrics does, which can make fewer parts. Raises `UserError` for NaN or fewer images than splits.
    """
    logits = check_features("logits", logits)
    check_int("num_splits", num_splits, 1)
    check(len(logits) >= num_splits, f"an inception score of {num_splits} splits needs as many images, found {len(logits)}")
    scores = split_scores(logits[np.random.default_rng(seed).permutation(len(logits))], num_splits, official)
    # torchmetrics divides by splits - 1, torch-fidelity by splits; the spread here is torch-fidelity's.
    return InceptionScore(float(scores.mean()), float(scores.std()), len(scores))


def few_samples_note(score: InceptionScore, num_samples: int) -> dict[str, str]:
    """Returns a note, which is logged too, if a score is more than half of what so few samples allow; else an empty one.

    The score of n images is at most n, so it then says more about their number than about the images.
    """
    most = num_samples // score.num_splits
    if score.mean <= most / 2:
        return {}
    warning = f"the inception score of {num_samples} samples is at most about {most}, as many as a split has; draw more samples"
    _log.warning("%s", warning)
    return {"inception_score_warning": warning}


def split_scores(logits: np.ndarray, num_splits: int, official: bool = False) -> np.ndarray:
    """Returns the score of each consecutive part of `logits`, float64 `[num_splits]`; cut as in `inception_score`."""
    from scipy.special import rel_entr, softmax

    count = len(logits)
    even = [split * count // num_splits for split in range(num_splits)]
    starts = range(0, count, -(-count // num_splits)) if official else even
    scores = []
    for start, stop in zip(starts, [*starts[1:], count], strict=True):
        p = softmax(logits[start:stop].astype(np.float64), axis=1)
        scores.append(np.exp(rel_entr(p, p.mean(axis=0)).sum(axis=1).mean()))
    return np.array(scores)
