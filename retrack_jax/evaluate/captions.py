"""The metrics of captioned images: SSCD and CLIP-IQA of samples under forgotten and under kept captions.

A metric's name is its own and the kind of caption: `sscd_forgotten`, `clip_iqa_kept`. The samples of a caption are compared with
the image that has it, and a metric is the mean over captions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from retrack_jax.evaluate.results import Evaluator
from retrack_jax.metrics.clip_iqa import ClipIqa
from retrack_jax.metrics.features.network import FeatureNetwork
from retrack_jax.metrics.sscd import sscd

KINDS = ("forgotten", "kept")


@dataclass(frozen=True, kw_only=True, eq=False)
class CaptionTask:
    """What every model of a run is evaluated against.

    Attributes:
      images: name of samples, such as `kept_03`, -> the image that has their caption, uint8 `[H, W, 3]`.
      sscd: `() -> FeatureNetwork` of copy detection; raises `Unavailable` without its weights.
      clip_iqa: `() -> ClipIqa`; raises `Unavailable` without its weights.
    """

    images: dict[str, np.ndarray]
    sscd: Callable[[], FeatureNetwork]
    clip_iqa: Callable[[], ClipIqa]

    def names(self, kind: str) -> list[str]:
        """The names of the samples of one kind of caption."""
        return [name for name in self.images if name.startswith(kind)]


def _sscd(task: CaptionTask, samples: dict[str, np.ndarray], wanted: Sequence[str]):
    network = task.sscd()

    def score(name: str) -> float:
        return float(sscd(network, samples[name], task.images[name][None]).mean())

    return _means("sscd", task, score), _note(task, samples, network)


def _clip_iqa(task: CaptionTask, samples: dict[str, np.ndarray], wanted: Sequence[str]):
    metric = task.clip_iqa()

    def score(name: str) -> float:
        unit = samples.get(f"{name}_float", samples[name].astype(np.float32) / np.float32(255.0))
        return float(metric(unit).mean())

    return _means("clip_iqa", task, score), _note(task, samples, metric.network)


def _means(metric: str, task: CaptionTask, score: Callable[[str], float]) -> dict[str, float]:
    names = {kind: task.names(kind) for kind in KINDS}
    return {f"{metric}_{kind}": float(np.mean([score(name) for name in these])) for kind, these in names.items() if these}


def _note(task: CaptionTask, samples: dict[str, np.ndarray], network: FeatureNetwork) -> dict:
    return {
        "features": network.description,
        "features_digest": network.digest,
        "num_captions": {kind: len(task.names(kind)) for kind in KINDS},
        "num_samples": len(samples[next(iter(task.images))]),
        "why": "no caption remains that is not forgotten too",
    }


EVALUATORS = [
    Evaluator(names=tuple(f"sscd_{kind}" for kind in KINDS), compute=_sscd),
    Evaluator(names=tuple(f"clip_iqa_{kind}" for kind in KINDS), compute=_clip_iqa),
]


def metric_names() -> tuple[str, ...]:
    """Returns every metric of captioned images that can be asked for."""
    return tuple(name for evaluator in EVALUATORS for name in evaluator.names)
