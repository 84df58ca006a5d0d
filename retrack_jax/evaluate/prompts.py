"""The metrics of text-to-image models: for each of a concept's two prompts SSCD, CLIP-IQA and the success rate.

A metric's name is its own and the prompt's kind: `sscd_original`, `clip_iqa_modified`. Each evaluator computes both kinds.
CLIP-IQA and the classifier are given floats, SSCD uint8, as in the official code; the note of a metric says so if floats were not
kept.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from retrack_jax import parallel
from retrack_jax.checks import UserError, check, check_choice
from retrack_jax.data.sources.concepts import CLASSIFIER, Concept
from retrack_jax.data.sources.prompts import KINDS
from retrack_jax.evaluate.networks import from_file
from retrack_jax.evaluate.results import Evaluator, Unavailable
from retrack_jax.metrics.clip_iqa import ClipIqa, make_clip_iqa
from retrack_jax.metrics.features.clip_image import towers_from_openai
from retrack_jax.metrics.features.network import FeatureNetwork
from retrack_jax.metrics.kmeans import centers_from_labels, clusters, read_centers, success_rate
from retrack_jax.metrics.sscd import sscd
from retrack_jax.models.tokenizer import ClipTokenizer

# config.eval.classifier -> where its centers come from.
CLASSIFIERS = {"joblib": "the shipped kmeans_classifier.joblib", "labels": "means of the shipped labels"}
CLIP_FILES = ("RN50.pt", "RN50.safetensors")


@dataclass(frozen=True, kw_only=True, eq=False)
class ConceptTask:
    """What every model of a run is evaluated against.

    Attributes:
      concept: the pictures, among them the memorized one.
      centers: `() -> centers [2, D]` of the k-means classifier; raises `Unavailable` without it.
      centers_name: where they come from.
      sscd: `() -> FeatureNetwork` of copy detection; raises `Unavailable` without its weights.
      clip_iqa: `() -> ClipIqa`; raises `Unavailable` without its weights.
    """

    concept: Concept
    centers: Callable[[], np.ndarray]
    centers_name: str
    sscd: Callable[[], FeatureNetwork]
    clip_iqa: Callable[[], ClipIqa]


@dataclass(frozen=True, eq=False)
class PromptSamples:
    """The samples of a model: `original` and `modified` uint8 `[N, H, W, 3]` and, if they were kept, `original_float`,
    ... in [0, 1]."""

    arrays: dict[str, np.ndarray]

    def pixels(self, kind: str) -> np.ndarray:
        """uint8 samples of one prompt."""
        return self.arrays[kind]

    def floats(self, kind: str) -> np.ndarray:
        """Samples of one prompt as precisely as they were kept, float32 in [0, 1]."""
        if f"{kind}_float" in self.arrays:
            return self.arrays[f"{kind}_float"]
        return self.arrays[kind].astype(np.float32) / np.float32(255.0)

    @property
    def precision(self) -> str:
        """What `floats` are made from."""
        return "float32" if f"{KINDS[0]}_float" in self.arrays else "uint8"


def concept_centers(concept: Concept, classifier: str) -> np.ndarray:
    """Returns the centers `[2, D]` of the concept's classifier: `joblib` reads the shipped file, `labels` refits them.

    Raises:
      Unavailable: the file is missing, cannot be read safely, or is for pictures of another size than the concept's here.
      UserError: an unknown classifier.
    """
    check_choice("config.eval.classifier", classifier, CLASSIFIERS)
    if classifier == "labels":
        return centers_from_labels(concept.images.images, concept.images.labels)
    path, instead = concept.folder / CLASSIFIER, "or refit it with --config.eval.classifier=labels"
    try:
        centers = read_centers(path)
    except UserError as error:
        raise Unavailable(f"{error}; {instead}") from error
    height, width, channels = concept.images.images.shape[1:]
    if centers.shape[1] != height * width * channels:
        fitted = math.isqrt(centers.shape[1] // channels)
        sizes = f"{fitted} x {fitted} pixels and config.data.resolution gives {height} x {width}"
        raise Unavailable(f"{path} is for {sizes}; set that, {instead}")
    return centers


def load_clip_iqa(weights_dir, tokenizer: ClipTokenizer, batch_size: int) -> ClipIqa:
    """Returns CLIP-IQA from one of `CLIP_FILES`, which hold the same tensors, in `weights_dir`.

    Raises:
      Unavailable: as `from_file`, or the tokenizer is not CLIP's.
    """

    def load(tensors: Mapping[str, np.ndarray], digest: str) -> ClipIqa:
        towers, known = towers_from_openai(dict(tensors)), tokenizer.eos_id + 1
        check(towers.text.vocab_size == known, f"it knows {towers.text.vocab_size} tokens, the checkpoint's tokenizer {known}")
        return make_clip_iqa(towers, tokenizer, digest, batch_size)

    return from_file(weights_dir, CLIP_FILES, load)


def memorised_samples(task: ConceptTask, samples: PromptSamples, kind: str) -> np.ndarray:
    """Returns bool `[N]`: which samples of one prompt the classifier calls memorized."""
    return clusters(samples.floats(kind), task.centers()) != 0


def memorised_of_both(task: ConceptTask, samples: PromptSamples) -> dict[str, np.ndarray] | None:
    """Returns `memorised_samples` of each prompt; None if there is no classifier."""
    try:
        return {kind: memorised_samples(task, samples, kind) for kind in KINDS}
    except Unavailable:
        return None


def _sscd(task: ConceptTask, samples: PromptSamples, wanted: Sequence[str]):
    network = task.sscd()
    memorised = task.concept.memorised[None]
    values = {f"sscd_{kind}": float(sscd(network, samples.pixels(kind), memorised).mean()) for kind in KINDS}
    note = {
        "features": network.description,
        "features_digest": network.digest,
        "reference": task.concept.memorised_name,
        "num_samples": len(samples.pixels(KINDS[0])),
    }
    return values, note


def _clip_iqa(task: ConceptTask, samples: PromptSamples, wanted: Sequence[str]):
    metric = task.clip_iqa()
    values = {f"clip_iqa_{kind}": float(metric(samples.floats(kind)).mean()) for kind in KINDS}
    note = {
        "features": metric.network.description,
        "features_digest": metric.network.digest,
        "samples": samples.precision,
        "num_samples": len(samples.pixels(KINDS[0])),
    }
    return values, note


def _success_rate(task: ConceptTask, samples: PromptSamples, wanted: Sequence[str]):
    centers = parallel.together(task.centers, Unavailable)
    values = {f"success_rate_{kind}": success_rate(samples.floats(kind), centers) for kind in KINDS}
    counts = {f"memorised_{kind}": int((clusters(samples.floats(kind), centers) != 0).sum()) for kind in KINDS}
    note = {
        "classifier": task.centers_name,
        "samples": samples.precision,
        "num_samples": len(samples.pixels(KINDS[0])),
        **counts,
    }
    return values, note


def _same_classifier(task: ConceptTask, note: dict) -> bool:
    return note.get("classifier") == task.centers_name


def _names(metric: str) -> tuple[str, ...]:
    return tuple(f"{metric}_{kind}" for kind in KINDS)


EVALUATORS = [
    Evaluator(names=_names("sscd"), compute=_sscd),
    Evaluator(names=_names("clip_iqa"), compute=_clip_iqa),
    Evaluator(names=_names("success_rate"), compute=_success_rate, is_current=_same_classifier),
]


def metric_names() -> tuple[str, ...]:
    """Returns every metric of prompts that can be asked for."""
    return tuple(name for evaluator in EVALUATORS for name in evaluator.names)
