"""The experiment in pixels: images, an unconditional UNet, and how both meet (experiment.py says what stages ask of it)."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from retrack_jax import files
from retrack_jax.checkpoints.run_store import tree_digest
from retrack_jax.checks import check, check_choice
from retrack_jax.config import build
from retrack_jax.data.dataset import ImageSet, unit_to_pixels
from retrack_jax.data.excluded import without
from retrack_jax.data.held_out import split_held_out
from retrack_jax.data.row_view import RowView
from retrack_jax.data.sources.load import load_images
from retrack_jax.data.target_names import is_random, resolve_target
from retrack_jax.diffusion.conversions import make_eps_fn
from retrack_jax.evaluate.checks import check_evaluation
from retrack_jax.evaluate.finetune import make_finetune
from retrack_jax.evaluate.images import evaluators
from retrack_jax.evaluate.networks import FEATURES, check_score_network, feature_network, load_sscd, score_network
from retrack_jax.evaluate.results import Results, evaluate, is_complete, read_results
from retrack_jax.evaluate.task import Subject, Task
from retrack_jax.neighbors.cache import cached_nearest, cached_nearest_of_targets
from retrack_jax.neighbors.copies import warn_of_copies
from retrack_jax.neighbors.distinct import distinct_neighbors
from retrack_jax.notation import PyTree
from retrack_jax.problem.pixel_model import check_fits, load_unet
from retrack_jax.problem.pixel_pictures import copies_of, forgotten_and_neighbors
from retrack_jax.problem.target import ForgetData, Target, make_target
from retrack_jax.run.workdir import Workdir
from retrack_jax.sampling import SAMPLERS, make_sampler
from retrack_jax.sampling.generate import generate, make_sample_fn, pmap_sample_fn


def check_pixel_config(config: ConfigDict) -> None:
    """Raises `UserError` for values of `config.sampling` and `config.eval` that no run on images in pixels can use."""
    check_choice("config.sampling.sampler", config.sampling.sampler, SAMPLERS)
    check_evaluation(config.eval)


class PixelExperiment:
    """Images in pixels, an unconditional UNet."""

    def __init__(self, config: ConfigDict):
        self.config = config
        check_pixel_config(config)
        images: ImageSet = load_images(config.data.to_dict())
        training, self.held_out = split_held_out(images, config.data.held_out)
        self.images = without(training, config.data.exclude)
        self.module, self._imported, self.schedule = load_unet(config)
        build.check_timesteps(config, self.num_timesteps)
        check_fits(self.module, self.images)
        check_score_network(config.eval.get("score_network", FEATURES), config.eval.metrics, self.image_shape)
        self.eps_fn = make_eps_fn(self.module.apply, self.schedule)
        # Before anything is trained: not every sampler takes every number of steps.
        self._sampler = make_sampler(config.sampling.sampler, self.schedule, config.sampling.num_steps)
        self.has_dropout = self.module.dropout > 0

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape of one image in the space that the network denoises, (H, W, C)."""
        return self.images.images.shape[1:]

    def inputs(self, target: Target | None = None) -> dict[str, str]:
        """Digests of what results depend on beside the config: what was read, and which rows `target` names in it."""
        labels = None if self.images.labels is None else np.asarray(self.images.labels).tolist()
        found = {"images": self.images.digest, "names or labels": files.json_digest([list(self.images.ids), labels])}
        if self._imported is not None:
            found["weights in config.checkpoint"] = self._imported_digest
        return found if target is None else {**found, "forgotten images": files.array_digest(target.forget)}

    @cached_property
    def _imported_digest(self) -> str:
        return tree_digest(self._imported)

    @property
    def num_timesteps(self) -> int:
        return self.schedule.num_train_timesteps

    def imported_params(self) -> PyTree | None:
        """The checkpoint's parameters, or None where the config names none."""
        return self._imported

    def init_params(self, seed: int) -> PyTree:
        """Random parameters."""
        x, t = jnp.zeros((1, *self.image_shape)), jnp.zeros((1,), jnp.int32)
        return jax.jit(self.module.init)(jax.random.key(seed), x, t)["params"]

    def all_rows(self) -> np.ndarray:
        """The rows of every training image."""
        return np.arange(len(self.images))

    def target(self, spec: str) -> Target:
        """Resolves what the user asked to forget. Raises `UserError` for a name that is not there, or for everything at once."""
        forget = resolve_target(spec, self.images)
        remain = np.setdiff1d(self.all_rows(), forget)
        check(len(remain) > 0, f"the target {spec!r} is the whole set of {len(self.images)} images; nothing would remain")
        build.check_num_neighbors(self.config, len(remain), spec)
        return make_target(spec, forget, remain, self.images.images[forget])

    def gather(self, rows: np.ndarray):
        """Returns `positions -> {"pixels": uint8 [b, H, W, C]}` within `rows`, for the stream of remaining images."""
        return lambda positions: {"pixels": np.ascontiguousarray(self.images.images[rows[positions]])}

    def condition(self, target: Target) -> tuple[jax.Array, ...]:
        """Further arguments of the network, such as a prompt's embedding: none here."""
        return ()

    def pretrained_folder(self, workdir: Workdir, target: Target) -> epath.Path:
        """Where the pretrained model's samples and metrics lie: they are the same for every target."""
        return workdir.pretrained

    def prepare_targets(self, targets: Sequence[Target], num_neighbors: int, backend: str) -> None:
        """Finds the neighbors of a whole sweep in one pass over the images; `forget_data` then reads them from the cache."""
        pairs = [(target.unique, target.forget) for target in targets]
        cached_nearest_of_targets(self.images, pairs, num_neighbors, cache_dir=self.cache_dir, backend=backend)

    def forget_data(self, target: Target, num_neighbors: int, backend: str) -> ForgetData:
        """The forgotten images, and with `num_neighbors` > 0 their nearest remaining images by pixels."""
        forget = {"pixels": np.ascontiguousarray(self.images.images[target.unique])}
        if not num_neighbors:
            return ForgetData(forget)
        rows, distances = cached_nearest(
            self.images, target.unique, num_neighbors, exclude=target.forget, backend=backend, cache_dir=self.cache_dir
        )
        ids = self.images.ids
        warn_of_copies(
            forget["pixels"], self.images.images[rows[:, 0]], lambda row: f"{ids[target.unique[row]]} and {ids[rows[row, 0]]}"
        )
        distinct, positions = distinct_neighbors(rows)
        bank = np.ascontiguousarray(self.images.images[distinct])
        return ForgetData(forget, {"pixels": bank}, positions, distances=distances)

    @property
    def cache_dir(self) -> epath.Path:
        """Where decoded images and neighbors are kept between runs."""
        return epath.Path(self.config.data.cache_dir).expanduser()

    @cached_property
    def _p_sample(self):
        output = "float32" if self.config.save_float else "uint8"
        return pmap_sample_fn(make_sample_fn(self.eps_fn, self._sampler, self.image_shape), output=output)

    def num_samples(self, target: Target) -> int:
        """How many images `sample` makes."""
        return self.config.sampling.num_images

    def sample(self, target: Target, params: PyTree, *, out_dir, fingerprint: str, progress) -> dict[str, np.ndarray]:
        """Returns the arrays of `samples.npz`: `samples` uint8 `[N, H, W, C]`, and with `config.save_float` `samples_float`."""
        sampling = self.config.sampling
        made = generate(
            self._p_sample,
            params,
            rng=jax.random.key(sampling.seed),
            num_images=sampling.num_images,
            batch_size=sampling.batch_size,
            out_dir=out_dir,
            fingerprint=fingerprint,
            progress=progress,
        )
        if made.dtype == np.uint8:
            return {"samples": made}
        return {"samples": unit_to_pixels(made), "samples_float": made}

    def sampling_digest(self, target: Target) -> str:
        """A digest of all that samples depend on beside the parameters."""
        sampling = self.config.sampling.to_dict()
        # Image i is the same in any batch and among any number, so finished parts stay of use when these change.
        settings = {name: value for name, value in sampling.items() if name not in ("batch_size", "num_images")}
        return files.json_digest([settings, self.schedule.to_config(), self.config.save_float])

    def export(self, path, params: PyTree, note: str) -> None:
        """Writes the network as diffusers saves it, with the licence and card of the checkpoint it came from."""
        from retrack_jax.checkpoints import export_diffusers

        source = self.config.checkpoint or None
        export_diffusers(path, self.module, jax.device_get(params), schedule=self.schedule, source=source, note=note)

    def describe_data(self, target: Target) -> dict:
        """What was remembered and forgotten, for provenance."""
        return {
            "name": self.images.name,
            "digest": self.images.digest,
            "inputs": self.inputs(target),
            "num_forget": len(target.forget),
            "num_remain": len(target.remain),
            "checkpoint": self.config.checkpoint or "pretrained here",
        }

    def describe_sampler(self) -> dict:
        """How samples were drawn, for provenance."""
        return self.config.sampling.to_dict()

    def evaluate(
        self, target: Target, model: Callable, pretrained: Callable, arrays: dict[str, np.ndarray], path, workdir, should_stop
    ) -> Results:
        """The metrics of `config.eval.metrics` for one model; `path` keeps what is computed, stopped or not."""
        if is_complete(path, self.config.eval.metrics):
            return read_results(path)
        pictures = epath.Path(path).parent / f"sscd-{target.slug}.npz"
        subject = Subject(model().params, arrays["samples"], arrays.get("samples_float"), pictures)
        task = self.task(target, workdir, pretrained, should_stop)
        return evaluate(evaluators(task), self.config.eval.metrics, task, subject, path, should_stop)

    def task(self, target: Target, workdir, pretrained: Callable, should_stop: Callable[[], bool] = lambda: False) -> Task:
        """What models are evaluated against; `pretrained` returns the model before unlearning."""
        evaluation = self.config.eval
        everything = evaluation.fid_reference == "all"
        rows = self.all_rows() if everything else target.remain
        return Task(
            forgotten=np.ascontiguousarray(self.images.images[target.unique]),
            reference=RowView(self.images.images, rows),
            reference_digest=files.json_digest([self.images.digest, files.array_digest(rows)]),
            reference_name=f"{len(rows)} {'training' if everything else 'remaining'} images of {self.images.name}",
            cache_dir=self.cache_dir,
            eps_fn=self.eps_fn,
            schedule=self.schedule,
            features=lambda: feature_network(
                evaluation.features, self.images, workdir.root / "features", evaluation.weights_dir, evaluation.fid_resize
            ),
            sscd=lambda: load_sscd(evaluation.weights_dir),
            classifier=score_network(evaluation.get("score_network", FEATURES), evaluation.weights_dir),
            held_out=self.held_out.images if self.held_out is not None and is_random(target.spec) else None,
            label=self._label_of(target),
            finetune=lambda params, with_forgotten: self._finetune(params, target, with_forgotten, should_stop),
            relearning=tuple(evaluation.relearning.steps),
            pretrained=lambda: pretrained().params,
            threshold=evaluation.frequency_threshold,
            nll_probes=evaluation.nll_probes,
            rng=jax.random.key(self.config.sampling.seed),
        )

    def _label_of(self, target: Target) -> int | None:
        """The label that all forgotten images and no remaining one have, or None."""
        if self.images.labels is None:
            return None
        labels = np.unique(self.images.labels[target.forget])
        alone = len(labels) == 1 and labels[0] not in self.images.labels[target.remain]
        return int(labels[0]) if alone else None

    def _finetune(self, params: PyTree, target: Target, with_forgotten: bool, should_stop: Callable[[], bool]):
        rows = np.concatenate([target.remain, target.unique]) if with_forgotten else target.remain
        return self._make_finetune(params, self.gather(rows), len(rows), should_stop)

    @cached_property
    def _make_finetune(self) -> Callable:
        recipe = self.config.eval.relearning
        how = build.pretrain_options_from(self.config.pretrain, self.num_timesteps, self.has_dropout)
        how = dataclasses.replace(how, accumulation=1)
        optimizer = build.relearning_optimizer_from(self.config)
        return make_finetune(self.eps_fn, self.schedule, how, optimizer, recipe.batch_size)

    def pictures(self, target: Target, before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> dict:
        """The arrays that the report of a run shows."""
        marks = {}
        if self.config.eval.frequency_threshold:
            marks = {"marked_before": self._marks(target, before), "marked_after": self._marks(target, after)}
        return {"before": before["samples"], "after": after["samples"], **marks, **self._target_pictures(target)}

    def comparison_pictures(self, target: Target, samples: dict[str, dict[str, np.ndarray]]) -> dict:
        """The arrays that the comparison shows."""
        marked = None
        if self.config.eval.frequency_threshold:
            marked = {name: self._marks(target, arrays) for name, arrays in samples.items()}
        images = {name: arrays["samples"] for name, arrays in samples.items()}
        return {"samples": images, "marked": marked, **self._target_pictures(target)}

    def _marks(self, target: Target, arrays: dict[str, np.ndarray]) -> np.ndarray:
        return copies_of(self.images.images[target.unique], arrays, self.config.eval.frequency_threshold)

    def _target_pictures(self, target: Target) -> dict:
        recipe = self.config.unlearn
        shown = forgotten_and_neighbors(self.images, target, recipe.num_neighbors, recipe.neighbor_backend, self.cache_dir)
        return {"mark_name": self.config.eval.mark_name, **shown}
