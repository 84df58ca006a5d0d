"""The metrics and the pictures of text-to-image models: a concept's two prompts, or the captions of images."""

from collections.abc import Callable, Mapping
from functools import cached_property, partial

import numpy as np

from retrack_jax.checks import check_choice
from retrack_jax.config.options import Options
from retrack_jax.evaluate import captions, prompts
from retrack_jax.evaluate.networks import load_sscd
from retrack_jax.evaluate.results import Results, evaluate
from retrack_jax.problem.captions import Captions
from retrack_jax.problem.codec import LatentCodec
from retrack_jax.problem.evaluation import Arrays, EvaluatedModel, all_or_none, neighbor_pictures
from retrack_jax.problem.target import Target
from retrack_jax.report.grids import thumbnails


class _OfText:
    """What both kinds have: the networks behind SSCD and CLIP-IQA, each read and compiled once for a whole sweep."""

    metric_names: Callable[[], tuple[str, ...]]

    def __init__(self, options: Options, tokenizer, codec: LatentCodec):
        self._options, self._tokenizer, self._codec = options, tokenizer, codec
        for name in options.eval.metrics:
            check_choice("config.eval.metrics", name, self.metric_names())

    @cached_property
    def _sscd(self):
        return load_sscd(self._options.eval.weights_dir)

    @cached_property
    def _clip_iqa(self):
        return prompts.load_clip_iqa(self._options.eval.weights_dir, self._tokenizer, batch_size=4)


class PromptEvaluation(_OfText):
    """A concept's two prompts: SSCD, CLIP-IQA and the success rate of each, from samples alone."""

    metric_names = staticmethod(prompts.metric_names)

    def evaluate(self, target: Target, model: EvaluatedModel) -> Results:
        samples, wanted = prompts.PromptSamples(model.arrays), self._options.eval.metrics
        return evaluate(prompts.EVALUATORS, wanted, self._task(target), samples, model.path, model.should_stop)

    def _task(self, target: Target) -> prompts.ConceptTask:
        classifier = self._options.eval.classifier
        return prompts.ConceptTask(
            concept=target.concept,
            centers=lambda: prompts.concept_centers(target.concept, classifier),
            centers_name=prompts.CLASSIFIERS[classifier],
            sscd=lambda: self._sscd,
            clip_iqa=lambda: self._clip_iqa,
        )

    def pictures(self, target: Target, before: Arrays, after: Arrays) -> dict:
        marks = {"marked_before": self._marks(target, before), "marked_after": self._marks(target, after)}
        return {"before": _small(before), "after": _small(after), **marks, **self._of_target(target)}

    def comparison_pictures(self, target: Target, samples: Mapping[str, Arrays]) -> dict:
        marks = {name: self._marks(target, arrays) for name, arrays in samples.items()}
        marked = all_or_none({name: kinds and kinds["original"] for name, kinds in marks.items()})
        shown = {name: _small(arrays)["original"] for name, arrays in samples.items()}
        return {"samples": shown, "marked": marked, **self._of_target(target)}

    def _marks(self, target: Target, arrays: Arrays) -> dict[str, np.ndarray] | None:
        return prompts.memorised_of_both(self._task(target), prompts.PromptSamples(arrays))

    def _of_target(self, target: Target) -> dict:
        return _small_pictures(neighbor_pictures(self._options, self._codec, target))


class CaptionEvaluation(_OfText):
    """Images with a caption each: SSCD and CLIP-IQA of samples under some forgotten and some kept captions."""

    metric_names = staticmethod(captions.metric_names)

    def __init__(self, options: Options, tokenizer, codec: LatentCodec, conditioning: Captions):
        super().__init__(options, tokenizer, codec)
        self._conditioning = conditioning

    def evaluate(self, target: Target, model: EvaluatedModel) -> Results:
        shown = self._conditioning.shown(target).items()
        task = captions.CaptionTask(
            images={name: target.images.images[row] for name, row in shown},
            sscd=lambda: self._sscd,
            clip_iqa=lambda: self._clip_iqa,
        )
        return evaluate(captions.EVALUATORS, self._options.eval.metrics, task, model.arrays, model.path, model.should_stop)

    def pictures(self, target: Target, before: Arrays, after: Arrays) -> dict:
        shown = [
            {
                "name": name,
                "file": target.images.ids[row],
                "caption": target.images.captions[row],
                "image": _thumbnails(target.images.images[row]),
                "old": thumbnails(before[name]),
                "new": thumbnails(after[name]),
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
        names = [name for name in self._conditioning.shown(target) if name.startswith(captions.KINDS[0])]
        return thumbnails(np.concatenate([arrays[name] for name in names]))

    def _of(self, target: Target) -> dict:
        search = partial(self._conditioning.search, own=self._options.recipe(self._options.method).own)
        return _small_pictures(neighbor_pictures(self._options, self._codec, target, search))


def _small(arrays: Arrays) -> Arrays:
    return {kind: thumbnails(arrays[kind]) for kind in prompts.KINDS}


def _small_pictures(pictures: dict) -> dict:
    return {**pictures, **{name: _thumbnails(pictures[name]) for name in ("forgotten", "neighbors")}}


def _thumbnails(images_: np.ndarray) -> np.ndarray:
    flat = thumbnails(images_.reshape(-1, *images_.shape[-3:]))
    return flat.reshape(*images_.shape[:-3], *flat.shape[1:])
