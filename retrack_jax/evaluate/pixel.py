"""The metrics of image models: which there are, and how samples, references and networks meet in each.

One `Evaluator` a family; adding a metric is one function and one row of `EVALUATORS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from etils import epath

from retrack_jax.data.dataset import Rows, pixels_to_model
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.evaluate.results import Evaluator
from retrack_jax.metrics.feature_metrics import FEATURE_METRICS, cached_feature_stats, evaluate_features, feature_stats
from retrack_jax.metrics.features.network import FeatureNetwork
from retrack_jax.metrics.frequency import frequency_upper_bound, target_distances
from retrack_jax.metrics.likelihood import nll_bits_per_dim
from retrack_jax.metrics.membership import denoising_losses
from retrack_jax.metrics.sscd import sscd, sscd_norm
from retrack_jax.sampling.inject import inject
from retrack_jax.types import PyTree, Rng


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """What every model of a run is evaluated against.

    Attributes:
      forgotten: the distinct forgotten images, uint8 `[F, H, W, C]`.
      reference: the real images that samples are compared with, uint8 `[N, H, W, C]`; reference_digest and reference_name say which.
      cache_dir: where the features of the reference are kept.
      eps_fn, schedule: the network and its schedule.
      features, sscd: `() -> FeatureNetwork`; raise `Unavailable` without their weights.
      threshold: L2 over [0, 1] pixels below which a sample counts as a forgotten image; 0: samples are not told apart.
      nll_probes: Rademacher probes of the likelihood's divergence.
      rng: the key of the likelihood's probes.
    """

    forgotten: np.ndarray
    reference: np.ndarray | Rows
    reference_digest: str
    reference_name: str
    cache_dir: epath.Path
    eps_fn: Callable
    schedule: Schedule
    features: Callable[[], FeatureNetwork]
    sscd: Callable[[], FeatureNetwork]
    threshold: float
    nll_probes: int
    rng: Rng


@dataclass(frozen=True, eq=False)
class Subject:
    """A model that is evaluated: its parameters, and its samples as uint8 and, where they were kept, as floats in [0, 1]."""

    params: PyTree
    samples: np.ndarray
    samples_float: np.ndarray | None = None

    @property
    def finest(self) -> np.ndarray:
        """The samples as precisely as they were kept."""
        return self.samples if self.samples_float is None else self.samples_float


def forgotten_samples(task: Task, subject: Subject) -> np.ndarray:
    """Returns bool `[N]`: which samples are a forgotten image; none where the task has no threshold."""
    if not task.threshold:
        return np.zeros(len(subject.samples), bool)
    return target_distances(subject.finest, task.forgotten) < task.threshold


def _frequency(task: Task, subject: Subject, wanted: Sequence[str]):
    hits = forgotten_samples(task, subject)
    note = {
        "num_samples": len(hits),
        "hits": int(hits.sum()),
        "upper_bound_95": frequency_upper_bound(int(hits.sum()), len(hits)),
        "threshold": task.threshold,
        "samples": "uint8" if subject.samples_float is None else "float32",
    }
    return {"frequency": float(hits.mean())}, note


def _features(task: Task, subject: Subject, wanted: Sequence[str]):
    network = task.features()
    kept = subject.samples[~forgotten_samples(task, subject)]
    left_out = len(subject.samples) - len(kept)
    if len(kept) < 2:
        return {}, {"why": "fewer than two samples are left beside the forgotten image"}
    reference = cached_feature_stats(network, task.reference, task.reference_digest, task.cache_dir)
    values, note = evaluate_features(feature_stats(network, kept), reference, wanted)
    about = {"features_digest": network.digest, "reference": task.reference_name}
    return values, {**note, **about, "left_out": f"{left_out} samples that are the forgotten image"}


def _nll(task: Task, subject: Subject, wanted: Sequence[str]):
    bits, stderr = nll_bits_per_dim(
        task.eps_fn, subject.params, task.schedule, pixels_to_model(task.forgotten), task.rng, num_probes=task.nll_probes
    )
    note = {"num_images": len(bits), "num_probes": task.nll_probes, "mode": "official"}
    if stderr is not None:
        note["stderr"] = float(np.sqrt(np.square(stderr).sum()) / len(bits))
    return {"nll_bits_per_dim": float(np.mean(bits))}, note


def _sscd(task: Task, subject: Subject, wanted: Sequence[str]):
    network = task.sscd()
    drawn = injected(task, subject.params)
    measures = {"sscd": sscd, "sscd_norm": sscd_norm}
    values = {name: float(np.mean(measures[name](network, drawn, task.forgotten))) for name in wanted}
    return values, {"features": network.description, "num_images": len(drawn), "injected_at_t": 250, "sampler": "ddpm, full schedule"}


def injected(task: Task, params: PyTree) -> np.ndarray:
    """Returns what the model makes of each forgotten image noised to t = 250, floats in [0, 1] `[F, H, W, C]`, one at a time."""

    @jax.jit
    def one(params, x_0, rng):
        return inject(lambda x, t: task.eps_fn(params, x, t), x_0[None], rng[None], task.schedule)[0]

    rngs = jax.random.split(task.rng, len(task.forgotten))
    made = [np.asarray(one(params, x_0, rng)) for x_0, rng in zip(pixels_to_model(task.forgotten), rngs, strict=True)]
    return np.clip(np.stack(made) / 2 + 0.5, 0.0, 1.0)


def _forget_loss(task: Task, subject: Subject, wanted: Sequence[str]):
    found = denoising_losses(task.eps_fn, subject.params, task.schedule, pixels_to_model(task.forgotten), task.rng)
    note = {"num_images": len(found), "num_noises": found.shape[1], "noises": "the same for every model, so differences are paired"}
    return {"forget_loss": float(found.mean())}, note


EVALUATORS = (
    Evaluator(names=("frequency",), compute=_frequency),
    Evaluator(names=FEATURE_METRICS, compute=_features),
    Evaluator(names=("nll_bits_per_dim",), compute=_nll),
    Evaluator(names=("forget_loss",), compute=_forget_loss),
    Evaluator(names=("sscd", "sscd_norm"), compute=_sscd),
)
METRIC_NAMES = tuple(name for evaluator in EVALUATORS for name in evaluator.names)
