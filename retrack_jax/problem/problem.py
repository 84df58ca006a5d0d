"""A problem is composed: data x denoiser x codec x conditioning, with what draws samples of it and what evaluates them.

Everything that differs between kinds of data and kinds of model is in one of the parts, so that a new kind is a new part and the
runs (run/) know none of them.
"""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from retrack_jax import files
from retrack_jax.checkpoints import load_pipeline, prompt_embeddings
from retrack_jax.checkpoints.diffusers_import import example_inputs
from retrack_jax.checkpoints.latent_diffusion import load_autoencoder
from retrack_jax.checkpoints.stable_diffusion import Pipeline, empty_prompt
from retrack_jax.checkpoints.text_encoders import text_digest
from retrack_jax.checks import check, check_int
from retrack_jax.config.options import Options
from retrack_jax.config.recipes import UnlearnOptions
from retrack_jax.data.dataset import ImageSet, RowView
from retrack_jax.data.distinct import copies_of, warn_of_copies
from retrack_jax.data.labels import most_neighbors
from retrack_jax.data.sources.table import SOURCES, complete_fields
from retrack_jax.notation import PyTree
from retrack_jax.problem.captions import Captions
from retrack_jax.problem.codec import Gather, LatentCodec, PixelCodec, check_resolution
from retrack_jax.problem.conditioning import Conditioning, PairedPrompts, with_conditions
from retrack_jax.problem.denoiser import Denoiser, check_image_model, image_denoiser, latent_denoiser
from retrack_jax.problem.evaluation import ImageEvaluation
from retrack_jax.problem.labels import Labels, check_whole_class, in_words
from retrack_jax.problem.picture_sizes import check_large_enough
from retrack_jax.problem.sampler import ProblemSampler
from retrack_jax.problem.target import ForgetData, Target, with_labels
from retrack_jax.problem.text_evaluation import CaptionEvaluation, PromptEvaluation
from retrack_jax.problem.text_states import text_states
from retrack_jax.problem.training_data import ConceptData, ImageData
from retrack_jax.problem.unread import check_unread
from retrack_jax.train.lora import ADAPTER, adapted
from retrack_jax.unlearn.methods import METHODS, RETRAIN
from retrack_jax.weights.kinds import autoencoder_folder, is_sd3, is_xl, takes_prompts

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Problem:
    """What is unlearned, from what.

    Attributes:
      data: training images, and what targets name.
      codec: between pixels and the space that the network denoises.
      conditioning: the input that the network gets besides the noisy image and its time.
      evaluation: metrics and pictures.
    """

    options: Options
    data: ImageData | ConceptData
    denoiser: Denoiser
    codec: PixelCodec | LatentCodec
    conditioning: Conditioning
    sampler: ProblemSampler
    evaluation: ImageEvaluation | PromptEvaluation | CaptionEvaluation

    def target(self, spec: str) -> Target:
        """Returns what the user asked to forget. Raises `UserError` if it is not there, or leaves too few images."""
        target = self.data.target(spec)
        if self.denoiser.takes_labels:
            target = with_labels(target, self.conditioning.null)
        room = most_neighbors(target.labels, target.forget, len(target.images))
        for name in self.options.method_names:
            if name not in METHODS or "neighbors" not in METHODS[name].streams:
                continue
            recipe = self.options.recipe(name)
            of_label = "" if room == len(target.remain) else " with the label of a forgotten one"
            check(
                recipe.num_neighbors <= room,
                f"config.unlearn.num_neighbors (K) is {recipe.num_neighbors}, but only {room} images{of_label} remain besides "
                f"{spec}; choose a smaller K",
            )
            check_whole_class(target, recipe)
        images, ids = target.images.images, target.images.ids
        copies = copies_of(np.ascontiguousarray(images[target.unique]), RowView(images, target.remain))
        warn_of_copies(len(target.unique), copies, lambda row, copy: f"{ids[target.unique[row]]} and {ids[target.remain[copy]]}")
        return target

    def note(self, method: str, target: Target) -> str:
        """Returns what a user must know of how `method` dealt with the target's labels, as a sentence, or ''."""
        has_neighbors = method in METHODS and "neighbors" in METHODS[method].streams
        return in_words(target, self.options.recipe(method)) if has_neighbors else ""

    def digests(self, target: Target | None = None) -> dict[str, str]:
        """Returns name -> digest of all that was read; without a target, of what does not depend on one."""
        chosen = {} if target is None else self.conditioning.digests_of(target)
        return {**self.data.digests(target), **self.denoiser.digests, **self.codec.digests, **self.conditioning.digests, **chosen}

    def gather(self, images: ImageSet, rows: np.ndarray) -> Gather:
        """Returns `positions [b] -> examples` within `rows` of `images`, each with its condition if it has one."""
        return with_conditions(self.codec.gather(images, rows), self.conditioning, images, rows)

    def forget_data(self, target: Target, recipe: UnlearnOptions, num_neighbors: int) -> ForgetData:
        """Returns what the training step holds of the target; with `num_neighbors` K > 0 its neighbors too."""
        search = self.conditioning.search(target, recipe.own)
        data = self.codec.forget_data(target, num_neighbors, recipe.neighbor_backend, search)
        if num_neighbors:
            data = dataclasses.replace(data, anchor=self.conditioning.anchor(target, data.similarity, recipe))
        if (condition_of := self.conditioning.of_images(target.images)) is not None:
            data = dataclasses.replace(data, forget={**data.forget, "condition": condition_of(target.unique)})
        return data

    def describe(self, target: Target) -> dict:
        """Returns what was remembered and forgotten, for provenance, as plain JSON."""
        return {
            **self.data.describe(target),
            "inputs": self.digests(target),
            "num_forget": len(target.forget),
            "num_remain": len(target.remain),
            "checkpoint": self.options.checkpoint or "pretrained here",
        }


def check_problem(options: Options) -> None:
    """Raises `UserError`, before anything is loaded, for fields that the kind of data of the config cannot use."""
    complete_fields(asdict(options.data))
    files.check_writable(options.data.cache_dir, files.IN_CACHE)  # neighbors are cached long after training began
    if not options.checkpoint:  # a checkpoint has its own schedule
        _check_timesteps(options, options.schedule.num_train_timesteps)
    kind = _kind(options)
    if kind is _concepts:
        _check_concepts(options)
    if kind is not _captioned_images:
        check_unread(options, "captions")
    if kind is not _images:
        check_unread(options, "labels")
    else:
        check_unread(options, "prompts")
        if options.checkpoint:
            check_image_model(options.checkpoint)
        check(options.export != "single_file", "config.export is single_file, which only Stable Diffusion has; choose unet")
        whole = options.export != "pipeline" or autoencoder_folder(options.checkpoint) is not None
        check(whole, "config.export is pipeline, and a model of pixels has no more parts than its network; choose unet")
    check(
        kind is not _captioned_images or options.data.channels in (0, 3),
        f"config.data.channels is {options.data.channels}, and text-to-image networks take pictures in color; leave it out",
    )
    check(
        kind is not _captioned_images or options.export != "single_file" or not is_sd3(options.checkpoint),
        "config.export is single_file, which is not written for Stable Diffusion 3; choose unet or pipeline",
    )
    _check_adapters(options, kind)


def _kind(options: Options) -> Callable[[Options], Problem]:
    """Returns the function that composes the problem; of images, those for a network that takes prompts have captions."""
    if SOURCES[options.data.source].gives_concepts:
        return _concepts
    return _captioned_images if takes_prompts(options.checkpoint) else _images


def _check_adapters(options: Options, kind: Callable[[Options], Problem]) -> None:
    check(
        options.method != RETRAIN or not options.unlearn.has_adapter,
        f"config.unlearn.adapter is {options.unlearn.adapter!r}, but {RETRAIN} trains from random weights; leave the adapter out",
    )
    for name in options.method_names:
        options.recipe(name).check_adapter()
    alone = any(lora.export == ADAPTER for name in options.method_names if (lora := options.lora(name)))
    check(
        kind is not _images or not alone,
        "config.unlearn.lora.export is adapter, and diffusers loads adapters into Stable Diffusion alone; choose merged",
    )


def _check_concepts(options: Options) -> None:
    check(
        bool(options.checkpoint),
        "config.checkpoint is empty; set it to a Stable Diffusion folder (see docs/guide/text-to-image.md)",
    )
    newer = "XL" if is_xl(options.checkpoint) else "3" if is_sd3(options.checkpoint) else ""
    check(
        not newer,
        f"{options.checkpoint} is Stable Diffusion {newer}, and the concepts are the paper's, of Stable Diffusion 1.4; give "
        "that, or captioned pictures with configs/custom.py",
    )
    empty = "config.data.dir is empty; set it to the folder that holds one folder per concept and the prompts"
    check(bool(options.data.dir), empty)
    check_int("config.data.resolution", options.data.resolution)
    check_unread(options, "images")


def build_problem(options: Options) -> Problem:
    """Returns the problem that the config describes, its data and weights read.

    Raises:
      UserError: anything that the user can mend: files that are missing or do not fit each other or the config.
    """
    check_problem(options)
    problem = _kind(options)(options)
    _check_timesteps(options, problem.denoiser.schedule.num_train_timesteps)
    options.pretrain.check_draws(problem.denoiser.schedule, "config.pretrain.")
    if not options.checkpoint:
        options.pretrain.warn_of_warmup("config.pretrain")
    for name in options.method_names:
        options.recipe(name).check_draws(problem.denoiser.schedule, "config.unlearn.")
        options.recipe(name).warn_of_warmup("config.unlearn")
    for lora in {lora for name in options.method_names if (lora := options.lora(name))}:
        adapted(lora, jax.eval_shape(problem.denoiser.init_params, 0), "config.unlearn.lora.")
    if options.checkpoint and options.data.held_out:
        log.warning(
            "config.data.held_out leaves %g of the images out of what is trained here; %s may have been trained on them, and "
            "what is compared with them then says nothing of unseen images",
            options.data.held_out, options.checkpoint,
        )  # fmt: skip
    return problem


def _images(options: Options) -> Problem:
    """Images, in pixels or as latents, and a network that is unconditional or takes their labels."""
    data = ImageData(options.data)
    codec: PixelCodec | LatentCodec = PixelCodec(epath.Path(options.data.cache_dir).expanduser())
    if (coder := autoencoder_folder(options.checkpoint)) is not None:
        codec = LatentCodec(*load_autoencoder(coder, jnp.dtype(options.compute.dtype)), options.data)
    denoiser, conditioning = image_denoiser(options, data.images, codec), Conditioning()
    if denoiser.takes_labels:
        conditioning = Labels(options, data.images, denoiser.num_labels)
        null = getattr(denoiser.module, "num_embeds_ada_norm", None)
        if options.data.null_label is None and null is not None:
            log.warning("config.data.null_label is not set: label %d, for guidance, is neither trained nor unlearned", null)
    else:
        check_unread(options, "labels")
    sampler = ProblemSampler(options, denoiser, codec, conditioning)
    evaluation = ImageEvaluation(options, data, denoiser, codec, conditioning)
    return Problem(options, data, denoiser, codec, conditioning, sampler, evaluation)


def _latents(options: Options) -> tuple[Pipeline, LatentCodec, Denoiser]:
    """Returns a text-to-image pipeline, and the codec and the network in it."""
    own = {"dtype": jnp.dtype(options.compute.dtype), "remat": options.compute.remat}
    pipeline = load_pipeline(options.checkpoint, configs=options.pipeline, **own)
    codec = LatentCodec(pipeline.vae, pipeline.vae_params, pipeline.vae_digest, options.data)
    check_resolution(codec, options.data.resolution, example_inputs(pipeline.unet)[0].shape[1], pipeline.path)
    return pipeline, codec, latent_denoiser(pipeline, codec.latent_shape, options.export)


def _captioned_images(options: Options) -> Problem:
    """Images with a caption each, latents, and a text-to-image network."""
    data = ImageData(dataclasses.replace(options.data, channels=3), captioned=True)
    pipeline, codec, denoiser = _latents(options)
    if is_xl(options.checkpoint):
        size = pipeline.unet.sample_size
        own = size * pipeline.vae.downscale if isinstance(size, int) else options.data.resolution
        check_large_enough(data.images, own)
    captions = [*data.images.captions, *(data.held_out.captions if data.held_out is not None else ())]
    states = text_states(pipeline, captions, options.data.cache_dir)
    conditioning = Captions(states, partial(_encode, pipeline), options, is_xl(options.checkpoint))
    sampler = ProblemSampler(options, denoiser, codec, conditioning)
    evaluation = CaptionEvaluation(options, pipeline.tokenizer, codec, conditioning)
    return Problem(options, data, denoiser, codec, conditioning, sampler, evaluation)


def _encode(pipeline: Pipeline, prompt: str) -> PyTree:
    return prompt_embeddings(pipeline, [prompt]) if prompt else empty_prompt(pipeline)


def _concepts(options: Options) -> Problem:
    """The paper's Stable Diffusion experiment: pictures of one concept, latents, one fixed prompt for every example."""
    pipeline, codec, denoiser = _latents(options)
    encode, digest = partial(_encode, pipeline), text_digest(pipeline.text_encoders)
    conditioning = PairedPrompts(encode, options.sampling.negative_prompt, digest)
    sampler = ProblemSampler(options, denoiser, codec, conditioning)
    evaluation = PromptEvaluation(options, pipeline.tokenizer, codec)
    return Problem(options, ConceptData(options.data), denoiser, codec, conditioning, sampler, evaluation)


def _check_timesteps(options: Options, num_timesteps: int) -> None:
    """Raises `UserError` for timesteps that a schedule of `num_timesteps` does not have."""
    check_int("config.sampling.num_steps", options.sampling.num_steps, maximum=num_timesteps)
    for name in options.method_names:
        options.recipe(name).check_window(num_timesteps)
