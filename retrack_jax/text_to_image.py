"""The experiment in text and latents: Stable Diffusion, one concept a run.

It offers the stages what `experiment.PixelExperiment` offers them. What differs:

* A target is the name of a concept, a folder of pictures with labels: 1 forgotten, 0 remaining. Rows number the pictures
  of all concepts that were asked for, one after the other, so that rows say by themselves which concept they belong to.
* The network denoises latents. The VAE's posterior of each picture is cached; streams draw a fresh latent at each access.
  ReTrack's forgotten and neighbor latents are drawn once, from a fixed key, and neighbors are found among these latents.
* Training is conditioned on the concept's modified prompt, for every stream and method.
* Samples are of both prompts: `original` and `modified`, image i of both from the same noise; the pretrained model's are
  the target's too.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from retrack_jax import build, files, parallel
from retrack_jax.checkpoints.pipeline import export_pipeline, load_pipeline, prompt_embeddings
from retrack_jax.checks import UserError, check, check_choice, check_int, check_number
from retrack_jax.data.concepts import Concept, load_concept
from retrack_jax.data.latents import LatentSet, encode_set
from retrack_jax.data.prompts import PromptPair, prompts_of
from retrack_jax.data.targets import slug
from retrack_jax.diffusion.process import make_eps_fn
from retrack_jax.evaluate import concept as metrics
from retrack_jax.evaluate.networks import load_sscd
from retrack_jax.evaluate.results import Results, Unavailable, evaluate, is_complete, read_results
from retrack_jax.experiment import ForgetData, Target
from retrack_jax.neighbors.search import nearest
from retrack_jax.sampling import make_sampler
from retrack_jax.sampling.generate import generate, pmap_sample_fn
from retrack_jax.sampling.guided import GuidedParams, make_guided_sample_fn
from retrack_jax.types import PyTree
from retrack_jax.workdir import Workdir
from retrack_jax.writer import progress as progress_bar

log = logging.getLogger(__name__)
EXPORTS = ("pipeline", "unet", "none")
_THUMBNAIL = 128  # pixels a side of pictures in reports


@dataclass(frozen=True, eq=False)
class _Member:
    """A concept that was asked for: its pictures, prompts and the number of its first row."""

    concept: Concept
    prompts: PromptPair
    first_row: int


class TextToImageExperiment:
    """Concepts, a Stable Diffusion checkpoint, and how both meet."""

    def __init__(self, config: ConfigDict):
        self.config = config
        _check_config(config)
        pipeline = load_pipeline(
            config.checkpoint,
            dtype=build.DTYPES[config.compute.dtype],
            param_dtype=build.DTYPES[config.compute.param_dtype],
            remat=config.compute.remat,
        )
        self.pipeline = dataclasses.replace(pipeline, unet_params=jax.device_get(pipeline.unet_params))
        self.module, self.schedule = self.pipeline.unet, self.pipeline.schedule
        self.eps_fn = make_eps_fn(self.module.apply, self.schedule)
        self.has_dropout = self.module.dropout > 0
        self._members: dict[str, _Member] = {}
        self._latent_sets: dict[str, LatentSet] = {}

    @property
    def num_timesteps(self) -> int:
        return self.schedule.num_train_timesteps

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """The shape of one latent, (h, w, C)."""
        side = self.config.data.resolution // self.pipeline.vae.downscale
        return (side, side, self.pipeline.latent_channels)

    @property
    def cache_dir(self) -> epath.Path:
        """Where decoded pictures and latents are kept between runs."""
        return epath.Path(self.config.data.cache_dir).expanduser()

    def imported_params(self) -> PyTree:
        """The checkpoint's parameters, on the host: training donates what it starts from, and 3.4 GB need not stay on the
        device."""
        return self.pipeline.unet_params

    def init_params(self, seed: int) -> PyTree:
        """Random parameters, in the checkpoint's structure and dtype."""
        inputs = (
            jnp.zeros((1, *self.latent_shape)),
            jnp.zeros((1,), jnp.int32),
            jnp.zeros((1, 1, self.module.cross_attention_dim)),
        )
        params = jax.jit(self.module.init)(jax.random.key(seed), *inputs)["params"]
        return jax.tree.map(lambda leaf: leaf.astype(build.DTYPES[self.config.compute.param_dtype]), params)

    def all_rows(self) -> np.ndarray:
        """Not for this experiment: the model was trained on far more than concepts, and comes from a checkpoint."""
        raise UserError("Stable Diffusion cannot be pretrained here; set config.checkpoint")

    def target(self, spec: str) -> Target:
        """Resolves a concept's name. Raises `UserError` for one that is not there, lacks a file or a prompt, or a group of
        concepts."""
        check(
            not any(sign in spec for sign in "+*?[@") and not spec.startswith("label:"),
            f"the target {spec!r} is a group; one run forgets one concept, so name concepts and separate them by commas",
        )
        member = self._member(spec)
        rows = np.arange(len(member.concept.images)) + member.first_row
        forget, remain = rows[member.concept.forget], rows[member.concept.remain]
        flat = np.ascontiguousarray(member.concept.images.images[member.concept.forget]).reshape(len(forget), -1)
        _, first, copy_of = np.unique(flat, axis=0, return_index=True, return_inverse=True)
        return Target(spec, slug(spec), forget, remain, forget[first], copy_of.reshape(-1))

    def _member(self, name: str) -> _Member:
        if name not in self._members:
            data = self.config.data
            root = Path(data.dir).expanduser()
            concept = load_concept(root, name, resolution=data.resolution, cache_dir=self.cache_dir)
            # An absolute path stays as it is under `/`.
            prompts = prompts_of(
                name, root / Path(data.original_prompts).expanduser(), root / Path(data.modified_prompts).expanduser()
            )
            first_row = sum(len(member.concept.images) for member in self._members.values())
            self._members[name] = _Member(concept, prompts, first_row)
        return self._members[name]

    def _member_of(self, rows: np.ndarray) -> _Member:
        """The concept that `rows` belong to; never of two."""
        for member in self._members.values():
            if member.first_row <= rows[0] < member.first_row + len(member.concept.images):
                return member
        raise ValueError(f"row {rows[0]} belongs to no concept")

    def _latents(self, member: _Member) -> LatentSet:
        """The posterior of each picture of a concept, encoded by the VAE at first use."""
        concept, batch_size = member.concept, self.config.data.encode_batch_size
        if concept.name not in self._latent_sets:
            encode = jax.jit(lambda params, x: self.pipeline.vae.apply({"params": params}, x, method="encode"))
            main = parallel.is_main_process()
            with progress_bar([], f"encode {concept.name}", total=len(concept.images), is_main=main, unit="img") as bar:
                self._latent_sets[concept.name] = encode_set(
                    lambda x: encode(self.pipeline.vae_params, x),
                    concept.images,
                    vae_digest=self.pipeline.vae_digest,
                    cache_dir=self.cache_dir,
                    batch_size=batch_size,
                    progress=lambda done, total: bar.update(done - bar.n),
                )
        return self._latent_sets[concept.name]

    def gather(self, rows: np.ndarray):
        """Returns `positions -> {"mean", "std"}` within `rows`: the posterior that the stream of remaining latents is
        drawn from."""
        member = self._member_of(rows)
        latents = self._latents(member)
        return lambda positions: latents.posterior(rows[positions] - member.first_row)

    def condition(self, target: Target) -> tuple[jax.Array, ...]:
        """The embedding of the modified prompt, `[1, N, D]`."""
        return (prompt_embeddings(self.pipeline, [self._member(target.spec).prompts.modified]),)

    def pretrained_folder(self, workdir: Workdir, target: Target) -> epath.Path:
        """Where the pretrained model's samples and metrics for this concept's prompts lie."""
        return workdir.pretrained / target.slug

    def prepare_targets(self, targets: Sequence[Target], num_neighbors: int, backend: str) -> None:
        """Nothing: each concept has pictures and neighbors of its own."""

    def forget_data(self, target: Target, num_neighbors: int, backend: str) -> ForgetData:
        """The forgotten latents: their posterior, or with `num_neighbors` > 0 one draw of each and of its nearest
        remaining latents."""
        member = self._member(target.spec)
        latents, images = self._latents(member), member.concept.images.images
        forget, remain = target.unique - member.first_row, target.remain - member.first_row
        if not num_neighbors:
            return ForgetData(latents.posterior(forget))
        check(
            num_neighbors <= len(remain),
            f"config.unlearn.num_neighbors (K) is {num_neighbors}, but only {len(remain)} pictures of {target.spec} remain; "
            "choose a smaller K",
        )
        rng = jax.random.key(self.config.data.latent_seed)
        forget_x_0, remain_x_0 = latents.draw(forget, rng), latents.draw(remain, rng)
        found, distances = nearest(forget_x_0, remain_x_0, num_neighbors, backend)
        distinct, positions = np.unique(found, return_inverse=True)
        positions = positions.reshape(found.shape).astype(np.int32)
        pictures = _thumbnails(images[remain[distinct]])[positions]
        return ForgetData({"x_0": forget_x_0}, {"x_0": remain_x_0[distinct]}, positions, pictures, distances)

    def num_samples(self, target: Target) -> int:
        """How many images `sample` makes, of both prompts together."""
        return 2 * self.config.sampling.num_images

    @cached_property
    def _p_sample(self):
        sampling, pipeline = self.config.sampling, self.pipeline
        sampler = make_sampler(sampling.sampler, self.schedule, sampling.num_steps)

        def decode(params: PyTree, latents: jax.Array) -> jax.Array:
            return pipeline.vae.apply({"params": params}, latents, method="decode")

        sample_fn = make_guided_sample_fn(self.eps_fn, decode, sampler, self.latent_shape, guidance=sampling.guidance_scale)
        return pmap_sample_fn(sample_fn, output="float32" if self.config.save_float else "uint8")

    def sample(self, target: Target, params: PyTree, *, out_dir, fingerprint: str, progress) -> dict[str, np.ndarray]:
        """Returns the arrays of `samples.npz`: `original` and `modified` uint8 `[N, H, W, 3]`, with `config.save_float`
        floats too."""
        sampling, prompts = self.config.sampling, self._member(target.spec).prompts
        arrays, total = {}, self.num_samples(target)
        for number, (kind, prompt) in enumerate(prompts.items()):
            prompt_1ND, negative_1ND = (
                prompt_embeddings(self.pipeline, [text]) for text in (prompt, sampling.negative_prompt)
            )
            made = generate(
                self._p_sample,
                GuidedParams(params, self.pipeline.vae_params, prompt_1ND, negative_1ND),
                rng=jax.random.key(sampling.seed),
                num_images=sampling.num_images,
                batch_size=sampling.batch_size,
                out_dir=epath.Path(out_dir) / kind,
                fingerprint=files.json_digest([fingerprint, prompt]),
                progress=lambda done, _, number=number: progress(number * sampling.num_images + done, total),
            )
            if made.dtype == np.uint8:
                arrays[kind] = made
            else:
                arrays |= {kind: np.floor(255.0 * made).astype(np.uint8), f"{kind}_float": made}
        return arrays

    def sampling_digest(self, target: Target) -> str:
        """A digest of all that samples depend on beside the UNet's parameters and the prompts."""
        settings = (
            self.config.sampling.to_dict(),
            self.schedule.to_config(),
            self.config.save_float,
            self.config.data.resolution,
        )
        return files.json_digest([*settings, self.pipeline.vae_digest, self.config.compute.dtype])

    def export(self, path, params: PyTree, note: str) -> None:
        """Writes the unlearned UNet as diffusers saves it: a whole pipeline, the UNet alone, or nothing (`config.export`)."""
        if self.config.export == "none":
            return
        params = jax.device_get(params)
        if self.config.export == "pipeline":
            export_pipeline(path, self.pipeline, params, note=note)
            return
        from retrack_jax.checkpoints import export_diffusers

        source = self.pipeline.path / "unet"
        export_diffusers(path, self.module, params, schedule=self.schedule, source=source, note=note)

    def describe_data(self, target: Target) -> dict:
        """What was remembered and forgotten, for provenance."""
        member = self._member(target.spec)
        return {
            "name": target.spec,
            "digest": member.concept.images.digest,
            "num_forget": len(target.forget),
            "num_remain": len(target.remain),
            "memorised": member.concept.memorised_name,
            "prompts": dict(member.prompts.items()),
            "checkpoint": str(self.config.checkpoint),
            "vae_digest": self.pipeline.vae_digest,
        }

    def describe_sampler(self) -> dict:
        """How samples were drawn, for provenance."""
        return self.config.sampling.to_dict()

    def evaluate(self, target: Target, model: Callable, arrays: dict[str, np.ndarray], path, workdir: Workdir) -> Results:
        """The metrics of `config.eval.metrics` for one model; `path` keeps what is computed. They need its samples alone."""
        wanted = self.config.eval.metrics
        if is_complete(path, wanted):
            return read_results(path)
        return evaluate(metrics.EVALUATORS, wanted, self.task(target), metrics.PromptSamples(arrays), path)

    def task(self, target: Target) -> metrics.ConceptTask:
        """What models are evaluated against."""
        concept, evaluation = self._member(target.spec).concept, self.config.eval
        return metrics.ConceptTask(
            concept=concept,
            centers=lambda: metrics.concept_centers(concept, evaluation.classifier),
            centers_name="the shipped kmeans_classifier.joblib"
            if evaluation.classifier == "joblib"
            else "means of the shipped labels",
            sscd=lambda: load_sscd(evaluation.weights_dir),
            clip_iqa=lambda: self._clip_iqa,
        )

    @cached_property
    def _clip_iqa(self):
        return metrics.load_clip_iqa(self.config.eval.weights_dir, self.pipeline.tokenizer, batch_size=4)

    def pictures(self, target: Target, before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> dict:
        """The arrays that the report of a run shows, made small."""
        marks = {}
        if (found := self._marks(target, before)) is not None:
            marks = {"marked_before": found, "marked_after": self._marks(target, after)}
        return {"before": _small(before), "after": _small(after), **marks, **self._neighbor_pictures(target)}

    def comparison_pictures(self, target: Target, samples: dict[str, dict[str, np.ndarray]]) -> dict:
        """The arrays that the comparison shows: samples of the original prompt, which reproduced the memorised picture."""
        marks = {name: self._marks(target, arrays) for name, arrays in samples.items()}
        marked = None if None in marks.values() else {name: found["original"] for name, found in marks.items()}
        images = {name: _small(arrays)["original"] for name, arrays in samples.items()}
        return {"samples": images, "marked": marked, **self._neighbor_pictures(target)}

    def _marks(self, target: Target, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray] | None:
        """Which samples the classifier calls memorised; None where there is no classifier."""
        task, samples = self.task(target), metrics.PromptSamples(arrays)
        try:
            return {kind: metrics.memorised_samples(task, samples, kind) for kind in metrics.KINDS}
        except Unavailable:
            return None

    def _neighbor_pictures(self, target: Target) -> dict:
        recipe, member = self.config.unlearn, self._member(target.spec)
        data = self.forget_data(target, min(recipe.num_neighbors, len(target.remain)), recipe.neighbor_backend)
        few = slice(8)  # a page shows some of many
        forgotten = _thumbnails(member.concept.images.images[target.unique[few] - member.first_row])
        return {"forgotten": forgotten, "neighbors": data.neighbor_images[few], "distances": data.distances[few]}


def _small(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {kind: _thumbnails(arrays[kind]) for kind in metrics.KINDS}


def _thumbnails(images: np.ndarray) -> np.ndarray:
    """Returns images of at most about 128 pixels a side, by means over squares; smaller ones are left as they are."""
    factor = max(1, images.shape[1] // _THUMBNAIL)
    if factor == 1:
        return np.ascontiguousarray(images)
    count, height, width, channels = images.shape
    height, width = height // factor, width // factor
    squares = images[:, : height * factor, : width * factor].reshape(count, height, factor, width, factor, channels)
    return squares.mean(axis=(2, 4)).astype(np.uint8)


def _check_config(config: ConfigDict) -> None:
    check(
        config.method != "retrain",
        "Stable Diffusion cannot be pretrained or retrained here; choose another method than retrain",
    )
    check(
        bool(config.checkpoint),
        "config.checkpoint is empty; set it to a Stable Diffusion folder (see docs/stable_diffusion.md)",
    )
    check(
        bool(config.data.dir),
        "config.data.dir is empty; set it to the folder that holds one folder a concept and the prompts",
    )
    check_choice("config.export", config.export, EXPORTS)
    check_choice("config.compute.param_dtype", config.compute.param_dtype, build.DTYPES)
    check_choice("config.eval.classifier", config.eval.classifier, metrics.CLASSIFIERS)
    check_number("config.sampling.guidance_scale", config.sampling.guidance_scale, 0.0)
    check_int("config.data.encode_batch_size", config.data.encode_batch_size)
    check_int("config.data.resolution", config.data.resolution)
    check_int("config.data.latent_seed", config.data.latent_seed, minimum=0)
    for name in config.eval.metrics:
        check_choice("config.eval.metrics", name, metrics.METRIC_NAMES)
