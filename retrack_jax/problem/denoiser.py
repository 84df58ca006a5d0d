"""The network that is trained, with its noise schedule: a checkpoint's, or a new one of the config's shape."""

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax.checkpoints import (
    export_diffusers,
    export_pipeline,
    export_single_file,
    import_diffusers,
    read_schedule_config,
)
from retrack_jax.checkpoints.diffusers_export import export_lora
from retrack_jax.checkpoints.diffusers_import import example_inputs
from retrack_jax.checkpoints.latent_diffusion import read_autoencoder
from retrack_jax.checkpoints.pipeline_export import check_one_folder, export_folder
from retrack_jax.checkpoints.stable_diffusion import Pipeline
from retrack_jax.checks import UserError, check
from retrack_jax.config.options import DataOptions, Options
from retrack_jax.data.dataset import ImageSet
from retrack_jax.diffusion.conversions import make_eps_fn
from retrack_jax.diffusion.schedule import LEARNED_VARIANCE, Schedule
from retrack_jax.files import array_digest, json_digest
from retrack_jax.models.dit import DiT
from retrack_jax.models.unet2d import UNet2D
from retrack_jax.notation import ModelEpsFn, PyTree, Rng
from retrack_jax.problem.codec import LatentCodec, PixelCodec
from retrack_jax.train.lora import LoraOptions
from retrack_jax.train.run_store import tree_digest
from retrack_jax.weights.hub import local_model
from retrack_jax.weights.kinds import autoencoder_folder, network_config

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Denoiser:
    """A network, its noise schedule and what it predicts.

    Attributes:
      schedule: the noise schedule, which says what the network predicts.
      shape: of what it denoises, (H, W, C).
      params: the checkpoint's parameters, on the host, since a training step donates what it is given; None: to be trained here.
      condition: the smallest condition that the network takes, or nothing.
      export: `(path, params, note)` writes the network as diffusers saves it; `note` goes into its card.
      export_adapter: `(path, adapter, lora, note)` writes an adapter; None: diffusers reads none for this network.
      label_vectors: float32 `[labels, D]`, what the network takes in place of each label; None: the labels themselves.
    """

    module: nn.Module
    schedule: Schedule
    shape: tuple[int, int, int]
    params: PyTree | None
    condition: tuple[PyTree, ...]
    export: Callable[[object, PyTree, str], None]
    export_adapter: Callable[[object, PyTree, LoraOptions, str], None] | None = None
    label_vectors: np.ndarray | None = None

    @cached_property
    def eps_fn(self) -> ModelEpsFn:
        """`(params, x_t, t, *condition) -> eps`: one function object for one network, so that programs are compiled once."""
        return self._with_labels(_eps_fn(self.module, json.dumps(self.schedule.to_config())))

    def sampled_by(self, sampler: str) -> ModelEpsFn:
        """Returns what `sampler` calls: `eps_fn`, or for ddpm the same with the variance that the network has learned."""
        if sampler != "ddpm" or self.schedule.variance_type != LEARNED_VARIANCE:
            return self.eps_fn
        return self._with_labels(_eps_fn(self.module, json.dumps(self.schedule.to_config()), True))

    def _with_labels(self, eps_fn: ModelEpsFn) -> ModelEpsFn:
        vectors = self.label_vectors
        if vectors is None:
            return eps_fn
        return lambda params, x_t, t, label, **how: eps_fn(params, x_t, t, jnp.asarray(vectors)[label], **how)

    @property
    def takes_labels(self) -> bool:
        """Whether the network takes a label, int32, for each image."""
        return self.label_vectors is not None or [leaf.dtype for leaf in jax.tree.leaves(self.condition)] == [jnp.int32]

    @property
    def num_labels(self) -> int | None:
        """How many labels the network knows, from 0 on; None: any number."""
        return getattr(self.module, "num_labels", None) if self.label_vectors is None else len(self.label_vectors)

    @property
    def has_dropout(self) -> bool:
        """Whether the network has dropout, which training turns on."""
        return getattr(self.module, "dropout", 0.0) > 0

    def init_params(self, seed: int) -> PyTree:
        """Returns random parameters."""
        inputs = jnp.zeros((1, *self.shape)), jnp.zeros((1,), jnp.int32), *self.condition
        return _init(self.module, jax.random.key(seed), *inputs)["params"]

    @cached_property
    def digests(self) -> dict[str, str]:
        """Name -> digest of what was read; a new network's settings are the config's own."""
        read = {}
        if self.params is not None:
            read["weights in config.checkpoint"] = tree_digest(self.params)
            read["network's settings in config.checkpoint"] = json_digest(self.module.to_config())
            read["noise schedule in config.checkpoint"] = json_digest(self.schedule.to_config())
        if self.label_vectors is not None:
            read["vectors in config.data.label_vectors"] = array_digest(self.label_vectors)
        return read


@lru_cache(maxsize=8)
def _eps_fn(module: nn.Module, schedule: str, with_variance: bool = False) -> ModelEpsFn:
    return make_eps_fn(module.apply, Schedule.from_config(json.loads(schedule)), with_variance=with_variance)


@partial(jax.jit, static_argnums=0)
def _init(module: nn.Module, rng: Rng, *inputs: jax.Array) -> PyTree:
    return module.init(rng, *inputs)


def image_denoiser(options: Options, images: ImageSet, codec: PixelCodec | LatentCodec) -> Denoiser:
    """Returns the network of `config.checkpoint`, or a new one of the shape of `config.model` or `config.dit`, for `images` as
    `codec` has them.

    Raises:
      UserError: a checkpoint that is not there, not whole or not supported, or that cannot take the images; fields of
        `config.model` that make no network.
    """
    own = {"dtype": jnp.dtype(options.compute.dtype), "remat": options.compute.remat}
    source = local_model(options.checkpoint) if options.checkpoint else None
    shape = codec.shape(images)
    if source:
        check_image_model(source)
        module, params = import_diffusers(source)
        stored = read_schedule_config(source)
        coder = autoencoder_folder(source)
        check(
            coder is None or stored is not None,
            f"no scheduler/scheduler_config.json next to {coder}; it is the noise schedule that the model was trained with",
        )
        if stored is None:
            log.warning("no scheduler_config.json in %s; config.schedule is taken as its noise schedule", options.checkpoint)
        module = module.clone(**own)
    else:
        family, coder = UNet2D if options.network == "unet" else DiT, None
        module, params, stored = family.from_config(dataclasses.asdict(options.new_network), **own), None, None
        if family is UNet2D:  # which computes nothing from it: it tells diffusers at which size to draw
            module = module.clone(sample_size=shape[0] if shape[0] == shape[1] else shape[:2])
    schedule = Schedule.from_config(stored or options.schedule.to_config())
    if source:
        _warn_of_another_size(getattr(module, "sample_size", None), shape[:2], options.checkpoint)
    _check_fits(module, shape, f"the {codec.denoised} of {images.name}", schedule)
    condition = example_inputs(module)[2:]

    def export(path, params: PyTree, note: str) -> None:
        params = jax.device_get(params)
        if coder is None:
            export_diffusers(path, module, params, schedule=schedule, source=source, note=note)
        elif options.export == "pipeline":
            export_folder(path, coder.parent, module, params, note=note)
        else:  # without a schedule: the folder would be a pipeline of pixels
            export_diffusers(path, module, params, source=source, note=note)

    takes_vectors = bool(condition) and condition[0].dtype != jnp.int32
    check(
        takes_vectors or not options.data.label_vectors,
        f"config.data.label_vectors is {options.data.label_vectors}, and the network takes no vectors; leave it out",
    )
    vectors = _label_vectors(condition[0].shape[1], options.data) if takes_vectors else None
    return Denoiser(module, schedule, shape, params, condition, export, label_vectors=vectors)


def _label_vectors(width: int, data: DataOptions) -> np.ndarray:
    """Returns the vectors of `config.data.label_vectors`, float32 `[labels, width]`."""
    where = "config.data.label_vectors"
    check(
        bool(data.label_vectors),
        f"the network takes a vector of {width} numbers for each label (class_embed_type identity); set {where} to an .npy file "
        f"[labels, {width}]",
    )
    path = Path(data.label_vectors).expanduser()
    try:
        vectors = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{where}: {path} cannot be read as .npy ({error})") from error
    fits = isinstance(vectors, np.ndarray) and vectors.ndim == 2 and vectors.shape[1] == width and vectors.dtype.kind in "fiu"
    shape = f"{vectors.dtype} {vectors.shape}" if isinstance(vectors, np.ndarray) else "an archive"
    check(fits and len(vectors) > 0, f"{where}: {path} holds {shape}; the network needs floats [labels, {width}]")
    check(bool(np.isfinite(vectors).all()), f"{where}: {path} holds NaN or infinity")
    return vectors.astype(np.float32)


def check_image_model(checkpoint) -> None:
    """Raises `UserError` if a checkpoint is no model of images that is supported, as far as its configs are there to tell."""
    found = network_config(checkpoint)
    if found is None:
        return
    network, config = found
    check(
        config.get("time_embedding_type") != "fourier",
        f"the network in {network} has time_embedding_type 'fourier': it takes log(t) and divides by t, so t = 0 gives NaN, in "
        "diffusers too; it is for the schedule of ScoreSdeVe, which is not supported",
    )
    if (coder := autoencoder_folder(checkpoint)) is not None:
        read_autoencoder(coder)


def latent_denoiser(pipeline: Pipeline, shape: tuple[int, int, int], kind: str) -> Denoiser:
    """Returns the network of a text-to-image pipeline, whose latents have `shape`; `kind` is `config.export`."""

    if kind == "pipeline":
        check_one_folder(pipeline)
    _warn_of_another_size(getattr(pipeline.unet, "sample_size", None), shape[:2], pipeline.path)
    check(
        kind != "single_file" or not pipeline.schedule.is_edm,
        "config.export=single_file: one file would not say that the model has EDM's sigmas; choose pipeline or unet",
    )

    def export(path, params: PyTree, note: str) -> None:
        params = jax.device_get(params)
        if pipeline.file is not None:
            note += (
                f"\n\nThe weights came from {pipeline.file.path.name}. Card and licenses are those of its configs; add its own."
            )
        if kind == "pipeline":
            export_pipeline(path, pipeline, params, note=note)
        elif kind == "single_file":
            export_single_file(path, pipeline, params, note=note)
        else:
            source = pipeline.path / pipeline.network
            export_diffusers(path, pipeline.unet, params, schedule=pipeline.schedule, source=source, note=note)

    def export_adapter(path, adapter: PyTree, lora: LoraOptions, note: str) -> None:
        how = {"rank": lora.rank, "alpha": lora.scale * lora.rank, "network": pipeline.network}
        export_lora(path, jax.device_get(adapter), source=pipeline.path, note=note, **how)

    condition = (pipeline.unet.smallest_condition,)
    return Denoiser(pipeline.unet, pipeline.schedule, shape, pipeline.unet_params, condition, export, export_adapter)


def _warn_of_another_size(trained, shape: Sequence[int], checkpoint: str) -> None:
    """Warns if images or latents of `shape`, height and width, are of another size than a checkpoint's network was made for."""
    own = (trained, trained) if isinstance(trained, int) else tuple(trained or shape)
    if own != tuple(shape):
        log.warning(
            "the network in %s is made for %d x %d and gets %d x %d: samples may be poor, and its export keeps the former",
            checkpoint, *own, *shape,
        )  # fmt: skip


def _check_fits(module, shape: tuple[int, int, int], what: str, schedule: Schedule) -> None:
    """Raises `UserError` if the network cannot take `what`, images or latents of `shape`, or makes channels without a use."""
    height, width, channels = shape
    inputs = example_inputs(module)
    check(
        len(inputs) == 2 or inputs[2].ndim <= 2,
        "the network in config.checkpoint takes a condition, and images alone have none; configs/stable_diffusion.py has prompts",
    )
    smallest, takes = inputs[0].shape[1], inputs[0].shape[3]
    check(
        channels == takes,
        f"{what} have {channels} channels and the network takes {takes}; choose the data and the checkpoint that belong together",
    )
    if getattr(module, "time_embedding_type", "") == "learned":
        check(
            schedule.has_betas,
            "the network's time_embedding_type is learned, with a row for each whole timestep, and the times of flows and of EDM "
            "are no whole numbers; give the scheduler_config.json that it was trained with",
        )
        check(
            module.num_train_timesteps >= schedule.num_train_timesteps,
            f"the network has learned an embedding of {module.num_train_timesteps} timesteps, and the schedule has "
            f"{schedule.num_train_timesteps}; give the scheduler_config.json that it was trained with",
        )
    variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    makes = jax.eval_shape(module.apply, variables, *inputs).shape[3]
    learned = makes == 2 * channels
    check(
        channels == makes or learned,
        f"the network makes {makes} channels of {channels}; it must make as many, or twice as many with a variance",
    )
    check(
        not learned or schedule.has_betas,
        f"the network makes {makes} channels of {channels}, eps and its variance, and the schedule is "
        f"{'EDM' if schedule.is_edm else 'a flow'}'s, whose networks make no variance; give the scheduler_config.json that it "
        "was trained with",
    )
    check(
        learned or schedule.variance_type != LEARNED_VARIANCE,
        f"the schedule's variance_type is {LEARNED_VARIANCE}, and the network makes no variance: {makes} channels of {channels}; "
        "choose fixed_small or fixed_large",
    )
    size = getattr(module, "sample_size", None)
    check(
        not isinstance(size, tuple) or size[0] == size[1] or size == (height, width),
        f"{what} are {height}x{width} and the network's sample_size is {size}, height and width; no rule "
        "makes them so, resize them before",
    )
    check(
        height % smallest == 0 and width % smallest == 0,
        f"{what} are {height}x{width}; the network needs sides that {smallest} divides; set config.data.resolution",
    )
