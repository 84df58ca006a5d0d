"""The inception scores of a classifier of its own: MNIST's, where the FID network knows no digits.

    inception_score            the classifier in evaluation mode
    inception_score_official   in training mode, as the official code leaves it: it normalises by the statistics of each batch of
                               256, the official size, so the number depends on the batch and on the order of the samples; its
                               parts are cut as torchmetrics cuts them

Both take the samples as precisely as they were kept: the official code gives this network floats, not floor(255 x).
"""

from collections.abc import Callable

import numpy as np

from retrack_jax.metrics.features.network import FeatureNetwork
from retrack_jax.metrics.inception_score import inception_score

OFFICIAL = "inception_score_official"
NUM_SPLITS = 10


def class_score(name: str, load: Callable[[bool], FeatureNetwork], samples: np.ndarray) -> tuple[dict[str, float], dict]:
    """Returns `{name: score}`, in [1, number of classes], and the note for provenance; no value if there are too few samples.

    Args:
      name: `inception_score` or `inception_score_official`.
      load: `official -> FeatureNetwork` with logits; raises `Unavailable` without its weights.
      samples: `[N, H, W, C]`, floats in [0, 1] or uint8, without those that are the forgotten image.
    """
    if len(samples) < NUM_SPLITS:
        return {}, {"why": f"{NUM_SPLITS} splits need as many samples; {len(samples)} are left beside the forgotten image"}
    official = name == OFFICIAL
    network = load(official)
    score = inception_score(network(samples, name)["logits"], seed=0, num_splits=NUM_SPLITS, official=official)
    note = {
        "features": network.description,
        "features_digest": network.digest,
        "num_samples": len(samples),
        "samples": str(samples.dtype),
        "std": score.std,
        "splits": score.num_splits,
    }
    if official:
        note["batch_dependent"] = f"normalised by the statistics of each batch of {network.batch_size} samples, in their order"
    return {name: score.mean}, note
