"""The recipe for data that has none of its own: fields that a config leaves as None, chosen by rules from size and
resolution.

With S the side of the images in pixels, between 32 and 256, and N the images that remain, the fewest of any target:

    (1)  f = (32 / S)^(2/3)
    (2)  rate = 2e-5 f, lambda = 0.02 f      the official values at S = 32 (CIFAR-10) and at S = 256 (CelebA-HQ)
    (3)  K = min(10, N)                      10 in every official recipe
    (4)  60 steps of 128 images up to S = 64, else 40 steps of 64 in 16 parts
"""

import logging
from pathlib import Path

from ml_collections import ConfigDict

from retrack_jax.checks import UserError, check
from retrack_jax.config import build
from retrack_jax.data.dataset import ImageSet
from retrack_jax.data.excluded import without
from retrack_jax.data.held_out import split_held_out
from retrack_jax.data.sources.load import known_names, load_images
from retrack_jax.data.target_names import resolve_target
from retrack_jax.files import read_json
from retrack_jax.unlearn.methods import METHODS

_FROM_CHECKPOINT = ("cifar10", "celebahq", "concepts")  # sources of configs that have no pretraining recipe
_RETRAINED = ("digits_tshirt", "mnist_tshirt", "concepts")  # the config has the checkpoint's recipe, or refuses it by itself
log = logging.getLogger(__name__)


def rules(num_remain: int, resolution: int) -> dict[str, float | int]:
    """Returns the fields of `config.unlearn` where `num_remain` images of `resolution` pixels per side remain, by (1) to (4)."""
    factor = (32 / min(max(resolution, 32), 256)) ** (2 / 3)
    small = resolution <= 64
    return {
        "learning_rate": float(f"{2e-5 * factor:.3g}"),
        "lam": float(f"{0.02 * factor:.3g}"),
        "num_neighbors": max(1, min(10, num_remain)),
        "num_steps": 60 if small else 40,
        "batch_size": 128 if small else 64,
        "accumulation": 1 if small else 16,
    }


def open_fields(config: ConfigDict) -> list[str]:
    """Returns the fields of `rules` that the config leaves to it, and `resolution` where that is left to the model."""
    names = [name for name in rules(1, 32) if config.unlearn[name] is None]
    return names + (["resolution"] if config.data.resolution is None else [])


def unset(config: ConfigDict) -> dict[str, str]:
    """Returns what the user must still set: field -> what to set it to."""
    chosen_by_rules = bool(open_fields(config))
    missing = {}
    if not config.checkpoint and chosen_by_rules:
        missing["config.checkpoint"] = "set it to the folder of your model, as diffusers saved it"
    elif not config.checkpoint and config.data.source in _FROM_CHECKPOINT:
        missing["config.checkpoint"] = f"{config.data.source} has no pretraining recipe; set it to a folder that diffusers saved"
    if not config.data.dir and chosen_by_rules:
        missing["config.data.dir"] = "set it to the folder of the model's training images"
    if not any(str(target).strip() for target in config.targets):
        missing["config.targets"] = "name the images to forget: @list.txt, or a+b+c"
    return missing


def check_retraining(config: ConfigDict) -> None:
    """Raises `UserError` where a model is to be retrained as its checkpoint was, and the config does not know how that was."""
    from_scratch = config.method in METHODS and METHODS[config.method].from_scratch
    if from_scratch and config.checkpoint and config.data.source not in _RETRAINED:
        raise UserError(
            f"config.method is {config.method}, but how {config.checkpoint} was trained is not in this config; "
            "choose another method"
        )


def complete(config: ConfigDict) -> ConfigDict:
    """Returns `config` with every None of `data.resolution` and of the fields of `rules` chosen; itself if there is none.

    Raises:
      UserError: something of `unset`; the model or the images are not where the config says; a target that is not there.
    """
    for field, advice in unset(config).items():
        raise UserError(f"{field} is empty; {advice}")
    check_retraining(config)
    names = open_fields(config)
    if not names:
        return config
    config = config.copy_and_resolve_references()
    resolution = config.data.resolution or _sample_size(config.checkpoint)
    chosen = rules(1, resolution) | {"resolution": resolution}
    if "resolution" in names:
        config.data.resolution = chosen["resolution"]
    if "num_neighbors" in names:
        chosen |= {"num_neighbors": rules(_fewest_remaining(config), resolution)["num_neighbors"]}
    for name in names:
        (config.data if name == "resolution" else config.unlearn)[name] = chosen[name]
    log.info("chosen by the rules of retrack_jax/recipe.py: %s", {name: chosen[name] for name in names})
    return config


def _fewest_remaining(config: ConfigDict) -> int:
    """How many images remain, the fewest of any target."""
    training, _ = split_held_out(_names(config), config.data.held_out)
    images = without(training, config.data.exclude)
    return min(len(images) - len(resolve_target(spec, images)) for spec in build.target_specs(config))


def _names(config: ConfigDict) -> ImageSet:
    """The images by name: a folder's without decoding, else the decoded images, which the run needs in any case."""
    data = config.data.to_dict()
    return known_names(data) or load_images(data)


def _sample_size(checkpoint: str) -> int:
    folder = Path(checkpoint).expanduser()
    paths = [folder / part / "config.json" for part in ("unet", "unet_ema", ".")]
    path = next((path for path in paths if path.is_file()), None)
    check(
        path is not None,
        f"no config.json in {folder}, its unet/ or its unet_ema/; set config.checkpoint to a folder that diffusers saved",
    )
    fields = read_json(path)
    check(isinstance(fields, dict), f"{path} holds no JSON object; restore it, or set config.checkpoint")
    size = fields.get("sample_size")
    if not isinstance(size, int):
        raise UserError(f"{path} has no sample_size that is one number ({size!r}); set config.data.resolution")
    return size
