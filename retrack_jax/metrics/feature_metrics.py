"""FID, KID, inception score, precision and recall from one pass over a feature network, and the reference set's cache."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from retrack_jax import files, parallel
from retrack_jax.checks import UserError, check_choice
from retrack_jax.metrics.features.network import FeatureNetwork
from retrack_jax.metrics.fid import fid, unstable_reason
from retrack_jax.metrics.inception_score import few_samples_note, inception_score
from retrack_jax.metrics.kid import kid
from retrack_jax.metrics.moments import Moments, moments_of
from retrack_jax.metrics.precision_recall import NEIGHBORS, precision_recall

FEATURE_METRICS = ("fid", "kid", "inception_score", "precision", "recall")
MAX_ROWS = 10_000  # KID, precision and recall take at most this many rows of a set; FID takes all.
# The fewest images with which a metric is defined, on each side. The inception score needs only samples, one per split.
FEWEST = {"fid": 2, "kid": 2, "inception_score": 10, "precision": 4, "recall": 4}
_CACHE_VERSION = 1
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class FeatureStats:
    """What the metrics need of one set of images.

    Attributes:
      network: the `FeatureNetwork.description` that made it.
      moments: of all images' features.
      rows: float32 `[min(N, MAX_ROWS), D]`, a random choice of the features in their order.
      logits: float32 `[N, C]`, or None for a network without classes.
    """

    network: str
    moments: Moments
    rows: np.ndarray
    logits: np.ndarray | None


def feature_stats(network: FeatureNetwork, images, desc: str = "") -> FeatureStats:
    """Returns the statistics of `images` `[N, H, W, C]` from one pass over them; arguments and errors as `FeatureNetwork`'s
    call."""
    outputs = network(images, desc)
    return stats_of(outputs["features"], outputs.get("logits"), network.description)


def stats_of(features, logits=None, network: str = "given features") -> FeatureStats:
    """Returns the statistics of features `[N, D]` and logits `[N, C]` that are already there."""
    moments = moments_of(features)
    rows = np.asarray(features, np.float32)
    if len(rows) > MAX_ROWS:
        rows = rows[np.sort(np.random.default_rng(0).choice(len(rows), MAX_ROWS, replace=False))]
    return FeatureStats(network, moments, rows, None if logits is None else np.asarray(logits, np.float32))


def too_few(wanted: Sequence[str], num_samples: int, num_reference: int) -> dict[str, str]:
    """Returns metric -> why it is not defined, for each of `wanted` that needs more images than there are."""
    reasons = {}
    for name in wanted:
        fewest = num_samples if name == "inception_score" else min(num_samples, num_reference)
        if fewest < FEWEST[name]:
            reasons[name] = f"{name} needs at least {FEWEST[name]} images, found {fewest}"
    return reasons


def evaluate_features(
    samples: FeatureStats, reference: FeatureStats, wanted: Sequence[str] = FEATURE_METRICS
) -> tuple[dict[str, float], dict]:
    """Returns the wanted metrics by name, and notes for provenance: counts, spreads, warnings.

    Args:
      samples, reference: from the same network and resize rule.
      wanted: some of `FEATURE_METRICS`; the inception score needs logits and looks at the samples alone.

    Raises:
      UserError: an unknown metric, two different networks, or too few images.
    """
    for name in wanted:
        check_choice("metric", name, FEATURE_METRICS)
    if samples.network != reference.network:
        raise UserError(f"samples were seen by {samples.network}, the reference by {reference.network}; use one network for both")
    values: dict[str, float] = {}
    notes = {"features": samples.network, "num_samples": samples.moments.count, "num_reference": reference.moments.count}
    if "fid" in wanted:
        values["fid"] = fid(samples.moments, reference.moments)
        warning = unstable_reason(samples.moments.count, reference.moments.count, len(samples.moments.mean))
        if warning:
            notes["fid_warning"] = warning
            log.warning("%s", warning)
    if "kid" in wanted:
        result = kid(samples.rows, reference.rows, seed=0)
        values["kid"] = result.mean
        notes["kid_subsets"] = f"{result.num_subsets} of {result.subset_size} images"
        if result.std is not None:
            notes["kid_std"] = result.std
    if "inception_score" in wanted:
        if samples.logits is None:
            raise UserError(f"{samples.network} has no classes, so it gives no inception_score; leave that metric out")
        score = inception_score(samples.logits, seed=0)
        values["inception_score"] = score.mean
        notes |= {"inception_score_std": score.std, "inception_score_splits": score.num_splits}
        notes |= few_samples_note(score, len(samples.logits))
    if "precision" in wanted or "recall" in wanted:
        shares = precision_recall(samples.rows, reference.rows)._asdict()
        values |= {name: value for name, value in shares.items() if name in wanted}
        sides = f"{len(samples.rows)} samples and {len(reference.rows)} reference images"
        notes["precision_recall"] = f"k = {NEIGHBORS}, {sides}"
    return values, notes


def cached_feature_stats(
    network: FeatureNetwork,
    images,
    data_digest: str,
    cache_dir,
    desc: str = "",
) -> FeatureStats:
    """Returns `feature_stats`, read from the folder `cache_dir` if they were computed before.

    The key names the data by the images' SHA-256 `data_digest`, and the network with its resize rule. A file that cannot be read
    is computed again.
    """
    key = {
        "version": _CACHE_VERSION,
        "data": data_digest,
        "network": network.name,
        "weights": network.digest,
        "resize": network.resize,
        "images": len(images),
    }
    path = files.cache_path(cache_dir, "features", key, "npz")
    arrays = files.read_cached(path, files.read_npz)
    # Each host may have its own cache, and all of them compute together.
    if parallel.any_process(arrays is None):
        stats = feature_stats(network, images, desc)
        moments = stats.moments
        arrays = {"count": np.array(moments.count), "mean": moments.mean, "scatter": moments.scatter, "rows": stats.rows}
        if stats.logits is not None:
            arrays["logits"] = stats.logits
        parallel.together(lambda: files.write_npz(path, advice=files.IN_CACHE, **arrays))
    moments = Moments(int(arrays["count"]), arrays["mean"], arrays["scatter"])
    return FeatureStats(network.description, moments, arrays["rows"], arrays.get("logits"))
