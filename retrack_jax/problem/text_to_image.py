"""The experiment in text and latents: Stable Diffusion, one concept a run.

It offers the stages what experiment.py lists. What differs from images in pixels:

* A target is the name of a concept, a folder of pictures with labels: 1 forgotten, 0 remaining. Rows number the pictures
  of all concepts that were asked for, one after the other, so that rows say by themselves which concept they belong to.
* The network denoises latents. The VAE's posterior of each picture is cached; streams draw a fresh latent at each access.
  ReTrack's forgotten and neighbor latents are drawn once, from a fixed key, and neighbors are found among these latents.
* Training is conditioned on the concept's modified prompt, for every stream and method.
* Samples are of both prompts: `original` and `modified`, image i of both from the same noise; the pretrained model's are
  the target's too.
"""

from collections.abc import Callable, Sequence
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from retrack_jax import files
from retrack_jax.checkpoints.run_store import tree_digest
from retrack_jax.checkpoints.stable_diffusion import load_pipeline, prompt_embeddings
from retrack_jax.checkpoints.stable_diffusion_export import export_pipeline
from retrack_jax.checks import UserError, check
from retrack_jax.config import build
from retrack_jax.config.text_to_image import check_text_to_image
from retrack_jax.diffusion.conversions import make_eps_fn
from retrack_jax.evaluate import prompts as metrics
from retrack_jax.evaluate.networks import load_sscd
from retrack_jax.evaluate.results import Results, evaluate
from retrack_jax.neighbors.distinct import distinct_neighbors
from retrack_jax.neighbors.search import nearest
from retrack_jax.notation import PyTree
from retrack_jax.problem.concept_members import ConceptMembers
from retrack_jax.problem.prompt_sampler import PromptSampler
from retrack_jax.problem.target import ForgetData, Target, make_target
from retrack_jax.report.grids import thumbnails
from retrack_jax.run.workdir import Workdir


class TextToImageExperiment:
    """Concepts, a Stable Diffusion checkpoint, and how both meet."""

    def __init__(self, config: ConfigDict):
        self.config = config
        check_text_to_image(config)
        self.pipeline = load_pipeline(
            config.checkpoint,
            dtype=build.DTYPES[config.compute.dtype],
            remat=config.compute.remat,
        )
        self.module, self.schedule = self.pipeline.unet, self.pipeline.schedule
        self.eps_fn = make_eps_fn(self.module.apply, self.schedule)
        self.has_dropout = self.module.dropout > 0
        build.check_timesteps(config, self.num_timesteps)
        self._check_resolution()
        output = "float32" if config.save_float else "uint8"
        self._sampler = PromptSampler(self.pipeline, self.eps_fn, self.latent_shape, output, **config.sampling.to_dict())
        encode = jax.jit(lambda params, x: self.pipeline.vae.apply({"params": params}, x, method="encode"))
        self._members = ConceptMembers(
            config.data.dir,
            original_prompts=config.data.original_prompts,
            modified_prompts=config.data.modified_prompts,
            resolution=config.data.resolution,
            cache_dir=self.cache_dir,
            encode=lambda x: encode(self.pipeline.vae_params, x),
            vae_digest=self.pipeline.vae_digest,
            batch_size=config.data.encode_batch_size,
        )

    def inputs(self, target: Target | None = None) -> dict[str, str]:
        """Digests of what results depend on beside the config: the checkpoint's weights and, with a target, its concept's own."""
        found = {"UNet weights in config.checkpoint": self._unet_digest, "VAE in config.checkpoint": self.pipeline.vae_digest}
        if target is None:
            return found
        member = self._members[target.spec]
        own = {
            "pictures": member.concept.images.digest,
            "labels of pictures": files.array_digest(member.concept.forget),
            "prompts": files.json_digest(dict(member.prompts.items())),
        }
        return found | own

    @cached_property
    def _unet_digest(self) -> str:
        return tree_digest(self.pipeline.unet_params)

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
        """The checkpoint's parameters, on the host: training donates what it is given, and 3.4 GB need not stay on the device."""
        return self.pipeline.unet_params

    def init_params(self, seed: int) -> PyTree:
        """Random parameters, in the checkpoint's structure."""
        latent, t, prompt = (1, *self.latent_shape), jnp.zeros((1,), jnp.int32), (1, 1, self.module.cross_attention_dim)
        return jax.jit(self.module.init)(jax.random.key(seed), jnp.zeros(latent), t, jnp.zeros(prompt))["params"]

    def _check_resolution(self) -> None:
        side = self.config.data.resolution
        factor = self.pipeline.vae.downscale * 2 ** (len(self.module.block_out_channels) - 1)
        wrong = f"config.data.resolution is {side}; the VAE and the UNet of {self.pipeline.path} need a multiple of {factor}"
        check(side % factor == 0, wrong)

    def all_rows(self) -> np.ndarray:
        """Not for this experiment: the model was trained on far more than concepts, and comes from a checkpoint."""
        raise UserError("Stable Diffusion cannot be pretrained here; set config.checkpoint")

    def target(self, spec: str) -> Target:
        """Resolves a concept's name. Raises `UserError` for a group, or one without its folder, files, prompts or K neighbors."""
        check(
            not any(sign in spec for sign in "+*?[@") and not spec.startswith("label:"),
            f"the target {spec!r} is a group; one run forgets one concept, so name concepts and separate them by commas",
        )
        member = self._members[spec]
        rows = np.arange(len(member.concept.images)) + member.first_row
        forget, remain = rows[member.concept.forget], rows[member.concept.remain]
        build.check_num_neighbors(self.config, len(remain), spec)
        return make_target(spec, forget, remain, member.concept.images.images[member.concept.forget])

    def gather(self, rows: np.ndarray):
        """Returns `positions -> {"mean", "std"}` within `rows`: what the stream of remaining latents is drawn from."""
        member = self._members.of(rows)
        latents = self._members.latents(member)
        return lambda positions: latents.posterior(rows[positions] - member.first_row)

    def condition(self, target: Target) -> tuple[jax.Array, ...]:
        """The embedding of the modified prompt, `[1, N, D]`."""
        return (prompt_embeddings(self.pipeline, [self._members[target.spec].prompts.modified]),)

    def pretrained_folder(self, workdir: Workdir, target: Target) -> epath.Path:
        """Where the pretrained model's samples and metrics for this concept's prompts lie."""
        return workdir.pretrained / target.slug

    def prepare_targets(self, targets: Sequence[Target], num_neighbors: int, backend: str) -> None:
        """Nothing: each concept has pictures and neighbors of its own."""

    def forget_data(self, target: Target, num_neighbors: int, backend: str) -> ForgetData:
        """The forgotten latents: their posterior, or with `num_neighbors` > 0 one draw of each and of its nearest neighbors."""
        member = self._members[target.spec]
        latents, images = self._members.latents(member), member.concept.images.images
        forget, remain = target.unique - member.first_row, target.remain - member.first_row
        if not num_neighbors:
            return ForgetData(latents.posterior(forget))
        rng = jax.random.key(self.config.data.latent_seed)
        forget_x_0, remain_x_0 = latents.draw(forget, rng), latents.draw(remain, rng)
        found, distances = nearest(forget_x_0, remain_x_0, num_neighbors, backend)
        distinct, positions = distinct_neighbors(found)
        pictures = thumbnails(images[remain[distinct]])[positions]
        return ForgetData({"x_0": forget_x_0}, {"x_0": remain_x_0[distinct]}, positions, pictures, distances)

    def num_samples(self, target: Target) -> int:
        """How many images `sample` makes, of both prompts together."""
        return self._sampler.total

    def sample(self, target: Target, params: PyTree, **how) -> dict[str, np.ndarray]:
        """Returns the arrays of `samples.npz`; see `PromptSampler.sample`. `params` are used up if they are to be halved."""
        params = _converted(params, build.DTYPES[self.config.compute.param_dtype])
        return self._sampler.sample(self._members[target.spec].prompts, params, **how)

    def sampling_digest(self, target: Target) -> str:
        """A digest of all that samples depend on beside the UNet's parameters and the prompts."""
        sampling, compute = self.config.sampling.to_dict(), self.config.compute
        # Image i is the same in any batch and among any number, so finished parts stay of use when these change.
        settings = {name: value for name, value in sampling.items() if name not in ("batch_size", "num_images")}
        how = settings, self.schedule.to_config(), self.config.save_float, self.config.data.resolution
        return files.json_digest([*how, self.pipeline.vae_digest, compute.dtype, compute.param_dtype])

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
        member = self._members[target.spec]
        return {
            "name": target.spec,
            "digest": member.concept.images.digest,
            "inputs": self.inputs(target),
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

    def evaluate(
        self, target: Target, model: Callable, pretrained: Callable, arrays: dict[str, np.ndarray], path, workdir, should_stop
    ) -> Results:
        """The metrics of `config.eval.metrics` for one model, from its samples alone; `path` keeps what is computed."""
        task, samples = self.task(target), metrics.PromptSamples(arrays)
        return evaluate(metrics.EVALUATORS, self.config.eval.metrics, task, samples, path, should_stop)

    def task(self, target: Target) -> metrics.ConceptTask:
        """What models are evaluated against."""
        concept, evaluation = self._members[target.spec].concept, self.config.eval
        return metrics.ConceptTask(
            concept=concept,
            centers=lambda: metrics.concept_centers(concept, evaluation.classifier),
            centers_name=metrics.CLASSIFIERS[evaluation.classifier],
            sscd=lambda: self._sscd,
            clip_iqa=lambda: self._clip_iqa,
        )

    # Each network is read and compiled once for the whole sweep.
    @cached_property
    def _sscd(self):
        return load_sscd(self.config.eval.weights_dir)

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
        return metrics.memorised_of_both(self.task(target), metrics.PromptSamples(arrays))

    def _neighbor_pictures(self, target: Target) -> dict:
        recipe, member = self.config.unlearn, self._members[target.spec]
        data = self.forget_data(target, min(recipe.num_neighbors, len(target.remain)), recipe.neighbor_backend)
        few = slice(8)  # a page shows some of many
        forgotten = thumbnails(member.concept.images.images[target.unique[few] - member.first_row])
        return {"forgotten": forgotten, "neighbors": data.neighbor_images[few], "distances": data.distances[few]}


def _converted(params: PyTree, dtype) -> PyTree:
    """Returns `params` in `dtype`; each leaf is deleted once it is converted, for both copies together would save nothing."""

    def convert(leaf: jax.Array) -> jax.Array:
        if leaf.dtype == dtype:
            return leaf
        made = jax.block_until_ready(leaf.astype(dtype))
        leaf.delete()
        return made

    return jax.tree.map(convert, params)


def _small(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {kind: thumbnails(arrays[kind]) for kind in metrics.KINDS}
