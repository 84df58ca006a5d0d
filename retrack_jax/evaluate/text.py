"""SSCD and CLIP-IQA of samples under prompts: a concept's two, or the captions of forgotten and of kept images.

A metric's name is its own and the kind of prompt: `sscd_original`, `clip_iqa_kept`. A sample of a prompt is compared with the
picture that belongs to it, or with the nearest if there are several, and a metric is the mean over the prompts of a kind.
CLIP-IQA is given floats, SSCD uint8, as in the official code; the note of a metric says so if floats were not kept.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from retrack_jax.checks import check
from retrack_jax.data.commands import WEIGHTS
from retrack_jax.evaluate.networks import from_file
from retrack_jax.evaluate.results import Evaluator
from retrack_jax.metrics.clip_iqa import ClipIqa, make_clip_iqa
from retrack_jax.metrics.features.clip_image import towers_from_openai
from retrack_jax.metrics.features.network import FeatureNetwork
from retrack_jax.metrics.sscd import sscd_of_nearest
from retrack_jax.models.tokenizer import ClipTokenizer

CAPTIONS = ("forgotten", "kept")  # kinds
Samples = Mapping[str, np.ndarray]  # prompt -> uint8 `[N, H, W, 3]` and, if they were kept, `PROMPT_float` in [0, 1]


@dataclass(frozen=True, kw_only=True, eq=False)
class TextTask:
    """What every model of a run is evaluated against.

    Attributes:
      images: prompt, its kind first, such as `kept_03` -> the pictures that belong to it, uint8 `[N, H, W, 3]`.
      sscd: `() -> FeatureNetwork` of copy detection; raises `Unavailable` without its weights.
      clip_iqa: `() -> ClipIqa`; raises `Unavailable` without its weights.
      note: what every metric's note says of the task.
    """

    images: dict[str, np.ndarray]
    sscd: Callable[[], FeatureNetwork]
    clip_iqa: Callable[[], ClipIqa]
    note: dict


def floats(samples: Samples, prompt: str) -> np.ndarray:
    """Returns the samples of one prompt as precisely as they were kept, float32 in [0, 1]."""
    exact = samples.get(f"{prompt}_float")
    return samples[prompt].astype(np.float32) / np.float32(255.0) if exact is None else exact


def precision(samples: Samples) -> str:
    """Returns what `floats` are made from."""
    return "float32" if any(name.endswith("_float") for name in samples) else "uint8"


def load_clip_iqa(weights_dir, tokenizer: ClipTokenizer, batch_size: int) -> ClipIqa:
    """Returns CLIP-IQA from the weights in `weights_dir`.

    Raises:
      Unavailable: as `from_file`, or the tokenizer is not CLIP's.
    """

    def load(tensors: Mapping[str, np.ndarray], digest: str) -> ClipIqa:
        towers, known = towers_from_openai(dict(tensors)), tokenizer.eos_id + 1
        check(towers.text.vocab_size == known, f"it knows {towers.text.vocab_size} tokens, the checkpoint's tokenizer {known}")
        return make_clip_iqa(towers, tokenizer, digest, batch_size)

    return from_file(weights_dir, WEIGHTS["CLIP RN50"][0], load)


def evaluators(kinds: Sequence[str]) -> list[Evaluator]:
    """Returns the evaluators of prompts of these kinds; their subject is a model's `Samples`."""

    def means(metric: str, task: TextTask, score: Callable[[str], float]) -> dict[str, float]:
        prompts = {kind: [prompt for prompt in task.images if prompt.startswith(kind)] for kind in kinds}
        return {f"{metric}_{kind}": float(np.mean([score(one) for one in these])) for kind, these in prompts.items() if these}

    def note(task: TextTask, samples: Samples, network: FeatureNetwork) -> dict:
        features = {"features": network.description, "features_digest": network.digest}
        return {**features, **task.note, "num_samples": len(samples[next(iter(task.images))])}

    def of_sscd(task: TextTask, samples: Samples, wanted: Sequence[str]):
        network = task.sscd()

        def score(prompt: str) -> float:
            return float(sscd_of_nearest(network, samples[prompt], task.images[prompt]).mean())

        return means("sscd", task, score), note(task, samples, network)

    def of_clip_iqa(task: TextTask, samples: Samples, wanted: Sequence[str]):
        metric = task.clip_iqa()
        values = means("clip_iqa", task, lambda prompt: float(metric(floats(samples, prompt)).mean()))
        return values, {**note(task, samples, metric.network), "samples": precision(samples)}

    return [
        Evaluator(names=tuple(f"{metric}_{kind}" for kind in kinds), compute=compute)
        for metric, compute in (("sscd", of_sscd), ("clip_iqa", of_clip_iqa))
    ]
