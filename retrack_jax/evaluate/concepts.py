"""The metrics of the paper's concepts: for each of a concept's two prompts SSCD, CLIP-IQA and the success rate.

The success rate is by the concept's own classifier of pixels, which is given floats (evaluate/text.py).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from retrack_jax import parallel
from retrack_jax.checks import UserError
from retrack_jax.data.sources.concepts import CLASSIFIER, KINDS, Concept
from retrack_jax.evaluate.results import Evaluator, Unavailable
from retrack_jax.evaluate.text import Samples, TextTask, evaluators, floats, precision
from retrack_jax.metrics.kmeans import CLASSIFIERS, centers_from_labels, clusters, read_centers, success_rate


@dataclass(frozen=True, kw_only=True, eq=False)
class ConceptTask(TextTask):
    """What every model of a run is evaluated against: the memorized picture, for both prompts, and the classifier.

    Attributes:
      centers: `() -> centers [2, D]` of the k-means classifier; raises `Unavailable` without it.
      centers_name: where they come from.
    """

    centers: Callable[[], np.ndarray]
    centers_name: str


def concept_task(concept: Concept, classifier: str, **networks) -> ConceptTask:
    """Returns the task of a concept; `networks` are `sscd` and `clip_iqa` of `TextTask`."""
    return ConceptTask(
        images=dict.fromkeys(KINDS, concept.memorised[None]),
        note={"reference": concept.memorised_name},
        centers=lambda: concept_centers(concept, classifier),
        centers_name=CLASSIFIERS[classifier],
        **networks,
    )


def concept_centers(concept: Concept, classifier: str) -> np.ndarray:
    """Returns the centers `[2, D]` of the concept's classifier: `joblib` reads the shipped file, `labels` refits them.

    Raises:
      Unavailable: the file is missing, cannot be read safely, or is for pictures of another size than the concept's here.
    """
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


def memorised_of_both(task: ConceptTask, samples: Samples) -> dict[str, np.ndarray] | None:
    """Returns for each prompt bool `[N]`: which samples the classifier calls memorized; None if there is no classifier."""
    try:
        return {kind: clusters(floats(samples, kind), task.centers()) != 0 for kind in KINDS}
    except Unavailable:
        return None


def _success_rate(task: ConceptTask, samples: Samples, wanted: Sequence[str]):
    centers = parallel.together(task.centers, Unavailable)
    values = {f"success_rate_{kind}": success_rate(floats(samples, kind), centers) for kind in KINDS}
    counts = {f"memorised_{kind}": int((clusters(floats(samples, kind), centers) != 0).sum()) for kind in KINDS}
    about = {"classifier": task.centers_name, "samples": precision(samples), "num_samples": len(samples[KINDS[0]])}
    return values, {**about, **counts}


_RATES = Evaluator(
    names=tuple(f"success_rate_{kind}" for kind in KINDS),
    compute=_success_rate,
    is_current=lambda task, note: note.get("classifier") == task.centers_name,
)
EVALUATORS = [*evaluators(KINDS), _RATES]
