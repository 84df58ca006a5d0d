"""How a problem is evaluated and shown: which table of metrics, against what, and which pictures a report has."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property, partial

import jax
import numpy as np
from etils import epath

from retrack_jax import files
from retrack_jax.checks import check_choice
from retrack_jax.config.options import Options
from retrack_jax.data.dataset import ImageSet, RowView
from retrack_jax.data.labels import most_neighbors
from retrack_jax.data.target_names import is_random
from retrack_jax.evaluate import images
from retrack_jax.evaluate.finetune import make_finetune
from retrack_jax.evaluate.networks import check_score_network, feature_network, load_mnist_resnet, load_sscd
from retrack_jax.evaluate.results import Results, evaluate, is_complete, read_results
from retrack_jax.evaluate.task import Subject, Task
from retrack_jax.metrics.features.network import MNIST_RESNET
from retrack_jax.metrics.frequency import target_distances
from retrack_jax.notation import PyTree
from retrack_jax.problem.codec import LatentCodec, PixelCodec
from retrack_jax.problem.conditioning import Conditioning, remembered_conditions, with_conditions
from retrack_jax.problem.denoiser import Denoiser
from retrack_jax.problem.target import Target
from retrack_jax.problem.training_data import ImageData

SHOWN = 8  # of a large group a page shows some
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """A model to evaluate.

    Attributes:
      params, pretrained: `() -> parameters` of the model and of the one before unlearning, called only if needed.
      arrays: the model's `samples.npz`.
      path: the JSON file that keeps what is computed, stopped or not.
      workdir: where networks that are trained for metrics lie.
      seed: the run's; None for the pretrained model, whose metrics all runs share.
      should_stop: asked between metrics; true raises `Preempted`.
    """

    params: Callable[[], PyTree]
    pretrained: Callable[[], PyTree]
    arrays: Arrays
    path: epath.Path
    workdir: epath.Path
    seed: int | None = None
    should_stop: Callable[[], bool] = lambda: False


class ImageEvaluation:
    """Images alone or with labels: FID and its kin, frequency, likelihood, what the model still knows of the forgotten images."""

    def __init__(
        self,
        options: Options,
        data: ImageData,
        denoiser: Denoiser,
        codec: PixelCodec | LatentCodec,
        conditioning: Conditioning,
    ):
        self._options, self._data, self._denoiser, self._codec = options, data, denoiser, codec
        self._conditioning = conditioning
        for name in options.eval.metrics:
            check_choice("config.eval.metrics", name, images.metric_names())
        check_score_network(options.eval.score_network, options.eval.metrics, data.images.images.shape[1:])

    def evaluate(self, target: Target, model: EvaluatedModel) -> Results:
        """Returns the metrics of `config.eval.metrics` for one model."""
        wanted = self._options.eval.metrics
        task = self._task(target, model)
        evaluators = images.evaluators(task)
        if is_complete(evaluators, wanted, task, model.path):  # no parameters are needed
            return read_results(model.path)
        pictures = epath.Path(model.path).parent / f"sscd-{target.slug}.npz"
        arrays = model.arrays
        subject = Subject(model.params(), arrays["samples"], arrays.get("samples_float"), pictures, arrays.get("labels"))
        return evaluate(evaluators, wanted, task, subject, model.path, model.should_stop)

    def _task(self, target: Target, model: EvaluatedModel) -> Task:
        options, data, denoiser, codec = self._options.eval, self._data, self._denoiser, self._codec
        seed = self._options.sampling.seed
        held_out = data.held_out if is_random(target.spec) else None
        everything = options.fid_reference == "all"
        rows = np.arange(len(target.images)) if everything else target.remain
        return Task(
            forgotten=np.ascontiguousarray(target.images.images[target.unique]),
            reference=RowView(target.images.images, rows),
            reference_digest=files.json_digest([target.images.digest, files.array_digest(rows)]),
            reference_name=f"{len(rows)} {'training' if everything else 'remaining'} images of {target.images.name}",
            cache_dir=epath.Path(self._options.data.cache_dir).expanduser() / "features",
            eps_fn=denoiser.eps_fn,
            schedule=denoiser.schedule,
            features=lambda: feature_network(
                options.features, target.images, model.workdir / "features", options.weights_dir, options.fid_resize
            ),
            sscd=lambda: load_sscd(options.weights_dir),
            classifier=partial(load_mnist_resnet, options.weights_dir) if options.score_network == MNIST_RESNET else None,
            clean=lambda: codec.clean(target.images, target.unique),
            decode=codec.decode,
            held_out=None if held_out is None else lambda: codec.clean(held_out, np.arange(len(held_out))),
            condition=remembered_conditions(self._conditioning, target, [(target.images, target.unique)]),
            held_out_condition=None if held_out is None else self._of_held_out(target, held_out),
            label=label_of(target),
            finetune=lambda params, with_forgotten: self._finetune(params, target, with_forgotten, model.should_stop),
            relearning=tuple(options.relearning.steps),
            pretrained=model.pretrained,
            threshold=options.frequency_threshold,
            of_forgotten=None if everything else self._conditioning.of_forgotten(target),  # which `everything` has too
            nll_probes=options.nll_probes,
            rng=jax.random.key(seed),
            protocol_rng=jax.random.key(model.seed if options.official_draws and model.seed is not None else seed),
        )

    def _of_held_out(self, target: Target, held_out: ImageSet) -> PyTree:
        return remembered_conditions(self._conditioning, target, [(held_out, np.arange(len(held_out)))])

    def _finetune(self, params: PyTree, target: Target, with_forgotten: bool, should_stop: Callable[[], bool]):
        rows = np.concatenate([target.remain, target.unique]) if with_forgotten else target.remain
        gather = with_conditions(self._codec.gather(target.images, rows), self._conditioning, target.images, rows)
        return self._make_finetune(params, gather, len(rows), should_stop)

    @cached_property
    def _make_finetune(self) -> Callable:
        denoiser, conditioning, recipe = self._denoiser, self._conditioning, self._options.eval.relearning
        # The model's own recipe, at a constant rate.
        rate = {"learning_rate": recipe.learning_rate, "learning_rate_schedule": "constant", "warmup_steps": 0}
        training = dataclasses.replace(self._options.pretrain, accumulation=1, **rate)
        how = training.step_options(denoiser.schedule.t_end, denoiser.has_dropout, conditioning.dropout)
        given = denoiser.eps_fn, denoiser.schedule, how, training.optimizer(), recipe.batch_size
        return make_finetune(*given, conditioning.dropped)

    def pictures(self, target: Target, before: Arrays, after: Arrays) -> dict:
        """Returns the arrays that the report of a run shows, from the samples of both models (`report.html.run_report`)."""
        marks = {"marked_before": self._marks(target, before), "marked_after": self._marks(target, after)}
        labels = {"labels": after.get("labels")}
        return {"before": before["samples"], "after": after["samples"], **marks, **labels, **self._of_target(target)}

    def comparison_pictures(self, target: Target, samples: Mapping[str, Arrays]) -> dict:
        """Returns the arrays that the comparison shows, from method -> samples (`report.comparison.comparison_report`)."""
        marked = {name: self._marks(target, arrays) for name, arrays in samples.items()}
        shown = {name: arrays["samples"] for name, arrays in samples.items()}
        return {"samples": shown, "marked": all_or_none(marked), **self._of_target(target)}

    def _marks(self, target: Target, arrays: Arrays) -> np.ndarray | None:
        """bool `[N]`: which samples lie nearer to a forgotten image than the threshold; None without a threshold."""
        threshold = self._options.eval.frequency_threshold
        if not threshold:
            return None
        return target_distances(arrays.get("samples_float", arrays["samples"]), target.images.images[target.unique]) < threshold

    def _of_target(self, target: Target) -> dict:
        return {"mark_name": self._options.eval.mark_name, **neighbor_pictures(self._options, self._codec, target)}


def neighbor_pictures(options: Options, codec: PixelCodec | LatentCodec, target: Target, search: Callable | None = None) -> dict:
    """Returns `forgotten` uint8 `[F, H, W, C]`, `neighbors` uint8 `[F, K, H, W, C]` and `distances` `[F, K]` of the first images,
    and `num_forgotten` of all.

    K is ReTrack's `num_neighbors`, on the pages of all methods, or as many as there are for each image: other methods set no
    bound on it. `search` takes a target to how its neighbors are searched.
    """
    recipe, few = options.recipe("retrack"), dataclasses.replace(target, unique=np.sort(target.unique)[:SHOWN])
    room = most_neighbors(target.labels, target.forget, len(target.images))
    how = None if search is None else search(few)
    data = codec.forget_data(few, min(recipe.num_neighbors, room), recipe.neighbor_backend, how)
    neighbors = target.images.images[data.neighbor_positions]
    forgotten = {"forgotten": target.images.images[few.unique], "num_forgotten": len(target.unique)}
    return forgotten | {"neighbors": neighbors, "distances": data.distances}


def all_or_none(marks: dict) -> dict | None:
    return None if any(mark is None for mark in marks.values()) else marks


def label_of(target: Target) -> int | None:
    """The label that all forgotten images and no remaining one have, or None."""
    if target.images.labels is None:
        return None
    labels = np.unique(target.images.labels[target.forget])
    alone = len(labels) == 1 and labels[0] not in target.images.labels[target.remain]
    return int(labels[0]) if alone else None
