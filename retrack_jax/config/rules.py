"""The recipe for data that has none: numbers that a config leaves as None, chosen by rules from size and resolution.

With S the side of what the network denoises, the images in pixels or their latents, between 32 and 256, and N the images that
remain, the fewest of any target:

    (1)  f = (32 / S)^(2/3)
    (2)  rate = 2e-5 f, lambda = 0.02 f      the official values at S = 32 (CIFAR-10) and at S = 256 (CelebA-HQ)
    (3)  K = min(10, N)                      10 in every official recipe; N of one label if the network takes labels
    (4)  60 steps of 128 images up to S = 64, else 40 steps of 64 in 16 parts; of latents always in 16 parts, because their
         networks are large for their S

A network that takes prompts denoises latents. Its recipe is that of Stable Diffusion, whatever the size:

    (5)  rate = 1e-5, lambda = 0.5, 30 steps of 16 images in 16 parts

Stable Diffusion XL and 3 train an adapter unless `config.unlearn.adapter` is none: all weights of XL take 41 GB of parameters,
gradients and moments. The matrices of an adapter need a higher rate than weights: 1e-4, as in diffusers' examples. Stable
Diffusion 3 was trained with logit-normal timesteps, (0, 1), and so is what is unlearned from it.

What is sampled and measured depends on the kind of model too, and so does memory: `_BY_KIND`. What is exported is the whole
pipeline for a latent model without prompts, whose network alone makes no images, else the network.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from retrack_jax.checkpoints.latent_diffusion import read_autoencoder
from retrack_jax.checkpoints.stable_diffusion import check_pipeline, pipeline_folder, with_mended_size
from retrack_jax.checks import UserError, check
from retrack_jax.config.options import Options
from retrack_jax.config.presets import DISTILLED, is_flow, schedule_config, with_preset
from retrack_jax.config.recipes import UnlearnOptions
from retrack_jax.data.labels import most_neighbors
from retrack_jax.data.left_out import resolve_remaining, split_held_out, without
from retrack_jax.data.sources.load import known_names, load_images
from retrack_jax.diffusion import edm
from retrack_jax.train.lora import LORA
from retrack_jax.unlearn.methods import METHODS
from retrack_jax.weights.folder import model_folder, read_config
from retrack_jax.weights.kinds import autoencoder_folder, is_sd3, is_xl, takes_prompts

log = logging.getLogger(__name__)
_ADAPTER_RATE = 1e-4
IMAGES, LATENTS, CAPTIONED, XL, SD3 = range(5)  # kinds of models; the first two take no prompts
_IMAGE_METRICS = ("fid", "sscd", "nll_bits_per_dim")
_TEXT_METRICS = ("sscd_forgotten", "sscd_kept", "clip_iqa_forgotten", "clip_iqa_kept")
# (group, field) -> its value for each kind.
_BY_KIND = {
    ("sampling", "sampler"): ("ddpm", "ddpm", "ddpm", "euler", "flow_euler"),  # unless the schedule asks for another
    ("sampling", "num_images"): (1000, 1000, 4, 4, 4),  # with captions, of each
    ("sampling", "batch_size"): (32, 32, 4, 1, 1),
    ("compute", "remat"): (False, True, True, True, True),  # 17 GB less with Stable Diffusion
    ("eval", "metrics"): (*(_IMAGE_METRICS,) * 2, *(_TEXT_METRICS,) * 3),
}  # fmt: skip


def kind_of(checkpoint) -> int:
    """Returns IMAGES, LATENTS, CAPTIONED, XL or SD3."""
    if takes_prompts(checkpoint):
        return XL if is_xl(checkpoint) else SD3 if is_sd3(checkpoint) else CAPTIONED
    return IMAGES if autoencoder_folder(checkpoint) is None else LATENTS


def rules(num_remain: int, resolution: int, kind: int = IMAGES) -> dict[str, float | int]:
    """Returns the options of unlearning if `num_remain` images remain, of which a side has `resolution` values, by (1) to (5)."""
    num_neighbors = max(1, min(10, num_remain))
    if kind in (CAPTIONED, XL, SD3):
        latents = {"num_steps": 30, "batch_size": 16, "accumulation": 16}
        return {"learning_rate": 1e-5, "lam": 0.5, "num_neighbors": num_neighbors, **latents}
    factor = (32 / min(max(resolution, 32), 256)) ** (2 / 3)
    small = resolution <= 64
    return {
        "learning_rate": float(f"{2e-5 * factor:.3g}"),
        "lam": float(f"{0.02 * factor:.3g}"),
        "num_neighbors": num_neighbors,
        "num_steps": 60 if small else 40,
        "batch_size": 128 if small else 64,
        "accumulation": 1 if small and kind == IMAGES else 16,
    }


def open_fields(options: Options) -> list[str]:
    """Returns the numbers that the config leaves to `rules`, and `resolution` if that is left to the model."""
    recipes = [recipe for name, recipe in options.methods.items() if name in options.method_names] + [options.unlearn]
    records = [record for recipe in recipes for record in (recipe, recipe.own)]
    numbers = [name for name in rules(1, 32) if any(getattr(record, name, 0) is None for record in records)]
    by_kind = [f"{group}.{name}" for group, name in _BY_KIND if getattr(getattr(options, group), name) is None]
    left = ["resolution"] * (options.data.resolution is None) + ["export"] * (options.export is None)
    return numbers + left + by_kind


def unset(options: Options) -> dict[str, str]:
    """Returns what the user must still set: field -> what to set it to."""
    chosen_by_rules = bool(open_fields(options))
    missing = {}
    if not options.checkpoint and chosen_by_rules:
        missing["config.checkpoint"] = "set it to the folder of your model, as diffusers saved it"
    elif not options.checkpoint and options.pretrain.num_steps is None:
        missing["config.checkpoint"] = f"{options.name} has no pretraining recipe; set it to a folder that diffusers saved"
    if not options.data.dir and chosen_by_rules:
        missing["config.data.dir"] = "set it to the folder of the model's training images"
    if not options.target_specs:
        missing["config.targets"] = "name the images to forget, such as --config.targets=@list.txt, a+b+c or label:7"
    return missing


def complete(options: Options) -> Options:
    """Returns `options` with every number of `open_fields` chosen, and the sampler of a preset; itself if there is none.

    Raises:
      UserError: something of `unset`; the model or the images are not where the config says; a target that is not there; a model
        that is to be retrained by a recipe that the config does not have.
    """
    options = with_preset(options)
    for field, advice in unset(options).items():
        raise UserError(f"{field} is empty; {advice}")
    from_scratch = options.method in METHODS and METHODS[options.method].from_scratch
    check(
        not from_scratch or options.pretrain.num_steps is not None,
        f"config.method is {options.method}, but how {options.checkpoint} was trained is not in this config; set "
        "config.pretrain.num_steps, batch_size and learning_rate to it, or choose another method",
    )
    kind = kind_of(options.checkpoint) if options.checkpoint else IMAGES
    names = open_fields(options)
    for name, value, of_kinds in (("adapter", LORA, (XL, SD3)), ("logit_normal", (0.0, 1.0), (SD3,))):
        if kind in of_kinds and getattr(options.unlearn, name) is None:
            options = _filled(options, {name: value})
            names.append(name)
    if not names:
        return options
    pixels = _pixels_of_latent(options)
    height, width = (options.data.resolution,) * 2 if options.data.resolution else _sample_size(options, pixels)
    side = round(math.sqrt(height * width))
    if "resolution" in names:  # images of a model that is not square are taken as they are, and must be of its size
        own = side if height == width else 0
        options = dataclasses.replace(options, data=dataclasses.replace(options.data, resolution=own))
    chosen = rules(_fewest_remaining(options) if "num_neighbors" in names else 1, side // pixels, kind)
    if options.sampling.sampler is None:
        own = dataclasses.replace(options.sampling, sampler=_own_sampler(options, kind))
        options = dataclasses.replace(options, sampling=own)
    options = chosen_by_kind(options, kind)
    chosen |= {f"{group}.{name}": getattr(getattr(options, group), name) for group, name in _BY_KIND}
    if options.export is None:
        options = dataclasses.replace(options, export="pipeline" if kind == LATENTS else "unet")
    others = {"resolution": options.data.resolution, "export": options.export, "adapter": options.unlearn.adapter}
    others["logit_normal"] = options.unlearn.logit_normal
    filled = _filled(options, chosen, {"learning_rate": _ADAPTER_RATE} if kind in (XL, SD3) else {})
    rates = {name: filled.recipe(name).learning_rate for name in filled.method_names if name in filled.methods}
    others["learning_rate"] = rates if len({*rates.values()}) > 1 else filled.unlearn.learning_rate
    shown = {name: {**chosen, **others}[name] for name in names}
    log.info("chosen by the rules of retrack_jax/config/rules.py: %s", shown)
    return filled


def chosen_by_kind(options: Options, kind: int) -> Options:
    """Returns `options` with the open fields chosen that only depend on the kind of model."""
    for (group, name), values in _BY_KIND.items():
        record = getattr(options, group)
        if getattr(record, name) is None:
            options = dataclasses.replace(options, **{group: dataclasses.replace(record, **{name: values[kind]})})
    return options


def _own_sampler(options: Options, kind: int) -> str:
    """Returns our name of the sampler that the model's schedule asks for; of its kind of model if that is any.

    Flows and EDM have no betas, which the ancestral sampler needs. An XL pipeline's own sampler is taken if it is one of ours.
    """
    config = schedule_config(options)
    name = config.get("_class_name")
    if kind == XL and (name in DISTILLED or config.get("timestep_spacing") == "trailing"):
        log.warning(
            "%s seems to be distilled (turbo, lightning, LCM): its training and its samples are not those of the base model; set "
            "config.sampling.num_steps to its few steps and config.sampling.guidance_scale to 1",
            options.checkpoint,
        )
    if is_flow(config):
        return "flow_euler"
    if name == edm.DPM_SOLVER or (kind == XL and name == "DPMSolverMultistepScheduler"):
        return "dpm_solver"
    return "euler" if name == edm.EULER else _BY_KIND["sampling", "sampler"][kind]


def _filled(options: Options, chosen: dict, of_adapters: Mapping = MappingProxyType({})) -> Options:
    """Returns `options` with what config.unlearn and each method leave open set to the values of `chosen`, or of `of_adapters`
    where an adapter is trained.
    """

    def fill(recipe: UnlearnOptions) -> UnlearnOptions:
        values = {**chosen, **(of_adapters if recipe.has_adapter else {})}
        own, shared = (
            {name: value for name, value in values.items() if getattr(record, name, 0) is None} for record in (recipe.own, recipe)
        )
        return dataclasses.replace(recipe, **shared, own=dataclasses.replace(recipe.own, **own))

    methods = {name: fill(recipe) for name, recipe in options.methods.items()}
    return dataclasses.replace(options, methods=methods, unlearn=fill(options.unlearn))


def _fewest_remaining(options: Options) -> int:
    """How many images remain that can be neighbors, the fewest of any target: of one label, if the network takes labels."""
    data = dataclasses.asdict(options.data)
    # By name: a folder's without decoding, else the decoded images, which the run needs in any case.
    training, _ = split_held_out(known_names(data) or load_images(data), options.data.held_out)
    images = without(training, options.data.exclude)
    config = read_config(model_folder(options.checkpoint)) if options.checkpoint else dataclasses.asdict(options.new_network)
    takes_labels = any(config.get(name) is not None for name in ("class_embed_type", "num_class_embeds"))
    takes_labels |= (config.get("num_embeds_ada_norm") or 1) > 1  # of a DiT
    labels = np.asarray(images.labels) if takes_labels and images.labels is not None else None
    targets = (resolve_remaining(spec, images, training) for spec in options.target_specs)
    return min(most_neighbors(labels, forget, len(images)) for forget in targets)


def _pixels_of_latent(options: Options) -> int:
    """How many pixels along a side one place of what the network denoises covers: 1 for a model of pixels."""
    coder = autoencoder_folder(options.checkpoint)
    if takes_prompts(options.checkpoint):
        coder = pipeline_folder(options.checkpoint, options.pipeline) / "vae"
        check_pipeline(coder.parent)
    return 1 if coder is None else read_autoencoder(coder).downscale


def _sample_size(options: Options, pixels: int) -> tuple[int, int]:
    """The (height, width) of the images that the model makes, in pixels."""
    prompts = takes_prompts(options.checkpoint)
    folder = model_folder(pipeline_folder(options.checkpoint, options.pipeline) if prompts else options.checkpoint)
    config = read_config(folder)
    size = (with_mended_size(config) if prompts else config).get("sample_size")
    pair = size if isinstance(size, list) else [size, size]
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise UserError(f"{folder} has no sample_size of one or two whole numbers ({size!r}); set config.data.resolution")
    return pair[0] * pixels, pair[1] * pixels
