"""The metrics and the pictures of text-to-image models: a concept's two prompts, or the captions of images."""

from collections.abc import Mapping
from functools import cache, partial

import numpy as np

from retrack_jax.checks import check_choice
from retrack_jax.config.options import Options
from retrack_jax.data.sources.concepts import KINDS
from retrack_jax.evaluate import concepts
from retrack_jax.evaluate.networks import load_sscd
from retrack_jax.evaluate.results import Evaluator, Results, evaluate
from retrack_jax.evaluate.text import CAPTIONS, TextTask, evaluators, load_clip_iqa
from retrack_jax.problem.captions import Captions
from retrack_jax.problem.codec import LatentCodec
from retrack_jax.problem.evaluation import Arrays, EvaluatedModel, all_or_none, neighbor_pictures
from retrack_jax.problem.target import Target


class _OfText:
    """What both kinds have: the networks behind SSCD and CLIP-IQA, each read and compiled once for a whole sweep.

    A kind defines `evaluators`, their `_task(target)`, and the pictures, as `ImageEvaluation`.
    """

    evaluators: list[Evaluator]

    def __init__(self, options: Options, tokenizer, codec: LatentCodec):
        self._options, self._codec, weights = options, codec, options.eval.weights_dir
        self._networks = {
            "sscd": cache(lambda: load_sscd(weights)),
            "clip_iqa": cache(lambda: load_clip_iqa(weights, tokenizer, batch_size=4)),
        }
        for name in options.eval.metrics:
            check_choice("config.eval.metrics", name, [one for evaluator in self.evaluators for one in evaluator.names])

    def evaluate(self, target: Target, model: EvaluatedModel) -> Results:
        wanted = self._options.eval.metrics
        return evaluate(self.evaluators, wanted, self._task(target), model.arrays, model.path, model.should_stop)


class PromptEvaluation(_OfText):
    """A concept's two prompts: SSCD, CLIP-IQA and the success rate of each, from samples alone."""

    evaluators = concepts.EVALUATORS

    def _task(self, target: Target) -> concepts.ConceptTask:
        return concepts.concept_task(target.concept, self._options.eval.classifier, **self._networks)

    def pictures(self, target: Target, before: Arrays, after: Arrays) -> dict:
        marks = {"marked_before": self._marks(target, before), "marked_after": self._marks(target, after)}
        return {"before": _of_kinds(before), "after": _of_kinds(after), **marks, **self._of_target(target)}

    def comparison_pictures(self, target: Target, samples: Mapping[str, Arrays]) -> dict:
        marks = {name: self._marks(target, arrays) for name, arrays in samples.items()}
        marked = all_or_none({name: kinds and kinds["original"] for name, kinds in marks.items()})
        shown = {name: arrays["original"] for name, arrays in samples.items()}
        return {"samples": shown, "marked": marked, **self._of_target(target)}

    def _marks(self, target: Target, arrays: Arrays) -> dict[str, np.ndarray] | None:
        return concepts.memorised_of_both(self._task(target), arrays)

    def _of_target(self, target: Target) -> dict:
        return neighbor_pictures(self._options, self._codec, target)


class CaptionEvaluation(_OfText):
    """Images with a caption each: SSCD and CLIP-IQA of samples under some forgotten and some kept captions."""

    evaluators = evaluators(CAPTIONS)

    def __init__(self, options: Options, tokenizer, codec: LatentCodec, conditioning: Captions):
        super().__init__(options, tokenizer, codec)
        self._conditioning = conditioning

    def _task(self, target: Target) -> TextTask:
        rows = self._conditioning.pictures(target)
        images = {name: target.images.images[mine] for name, mine in rows.items()}
        counts = {kind: sum(name.startswith(kind) for name in images) for kind in CAPTIONS}
        note = {"num_captions": counts, "why": "no caption remains that is not forgotten too"}
        return TextTask(images=images, note=note, **self._networks)

    def pictures(self, target: Target, before: Arrays, after: Arrays) -> dict:
        shown = [
            {
                "name": name,
                "file": target.images.ids[row],
                "caption": target.images.captions[row],
                "image": target.images.images[row],
                "old": before[name],
                "new": after[name],
            }
            for name, row in self._conditioning.shown(target).items()
        ]
        first = {"before": self._forgotten(target, before), "after": self._forgotten(target, after)}
        return {**first, "captions": shown, **self._of(target)}

    def comparison_pictures(self, target: Target, samples: Mapping[str, Arrays]) -> dict:
        shown = {name: self._forgotten(target, arrays) for name, arrays in samples.items()}
        return {"samples": shown, "marked": None, **self._of(target)}

    def _forgotten(self, target: Target, arrays: Arrays) -> np.ndarray:
        """Samples of all forgotten captions that are shown, one after the other."""
        names = [name for name in self._conditioning.shown(target) if name.startswith(CAPTIONS[0])]
        return np.concatenate([arrays[name] for name in names])

    def _of(self, target: Target) -> dict:
        search = partial(self._conditioning.search, own=self._options.recipe("retrack").own)
        return neighbor_pictures(self._options, self._codec, target, search)


def _of_kinds(arrays: Arrays) -> Arrays:
    return {kind: arrays[kind] for kind in KINDS}
