"""Which kind of model a folder holds, told by the small files in it before anything is loaded."""

from pathlib import Path
from typing import Any

from retrack_jax.checks import check
from retrack_jax.files import read_object
from retrack_jax.weights.folder import AUTOENCODER_FOLDERS, NETWORK_FOLDERS, read_config
from retrack_jax.weights.hub import local_model
from retrack_jax.weights.ldm_names import XL
from retrack_jax.weights.model_file import IS_AN_ADAPTER, open_model_file

# Adapters: changes to a model, as diffusers, kohya's scripts and peft save them.
_ADAPTERS = ("*lora*.safetensors", "*lora*.bin", "adapter_config.json", "adapter_model.*")
_DIT, _FORMER_DIT = "DiTTransformer2DModel", "Transformer2DModel"  # before diffusers 0.29, and PixArt's name, too
_UNET_OF_PROMPTS, _SD3 = "UNet2DConditionModel", "SD3Transformer2DModel"
T5 = "text_encoder_3"  # of Stable Diffusion 3, which can do without


def network_config(checkpoint) -> tuple[Path, dict[str, Any]] | None:
    """Returns (folder, its `config.json`) of the network in `checkpoint`: in one of `NETWORK_FOLDERS`, or itself; None if it
    is not there, or `checkpoint` is empty.
    """
    if not checkpoint:
        return None
    folder = local_model(checkpoint)
    places = [folder / name for name in (*NETWORK_FOLDERS, "")]
    place = next((place for place in places if (place / "config.json").is_file()), None)
    return None if place is None else (place, read_config(place))


def takes_prompts(checkpoint) -> bool:
    """Returns whether the network in `checkpoint` takes a prompt, as Stable Diffusion's does."""
    if not checkpoint:
        return False
    network = network_config(checkpoint)
    if network is None:
        return local_model(checkpoint).is_file()  # only Stable Diffusion is read from one file
    return network[1].get("_class_name") in (_UNET_OF_PROMPTS, _SD3)


def is_xl(checkpoint) -> bool:
    """Returns whether the network in `checkpoint` takes the sizes of pictures too, as Stable Diffusion XL's does.

    Raises `UserError` for a file that is damaged or holds something else than Stable Diffusion.
    """
    if not checkpoint:
        return False
    if (path := local_model(checkpoint)).is_file():
        return open_model_file(path)[1] is XL
    network = network_config(checkpoint)
    return network is not None and network[1].get("addition_embed_type") == "text_time"


def is_sd3(checkpoint) -> bool:
    """Returns whether the network in `checkpoint` is Stable Diffusion 3's transformer."""
    network = network_config(checkpoint)
    return network is not None and network[1].get("_class_name") == _SD3


def text_encoders(folder: Path) -> tuple[str, ...]:
    """Returns the names of the text encoders that the pipeline in `folder` is to have, by its network and its index."""
    if not is_sd3(folder):
        return ("text_encoder", "text_encoder_2")[: 1 + is_xl(folder)]
    index = pipeline_index(folder)
    has_t5 = index.get(T5) not in (None, [None, None]) if index else (folder / T5).is_dir()
    return ("text_encoder", "text_encoder_2", T5)[: 2 + has_t5]


def tokenizer_of(text_encoder: str) -> str:
    """Returns the name of the tokenizer's folder that goes with that of a text encoder."""
    return text_encoder.replace("text_encoder", "tokenizer")


def pipeline_index(folder: Path) -> dict[str, Any]:
    """Returns the `model_index.json` in `folder`, or an empty dict: old pipelines have none."""
    return read_object(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}


def autoencoder_folder(checkpoint) -> Path | None:
    """Returns the folder of the autoencoder next to the network of `checkpoint`; None if that denoises pixels, or is not there.

    Raises `UserError` if the pipeline's model_index.json lists an autoencoder that is not there.
    """
    network = network_config(checkpoint)
    if network is None:
        return None
    folder = network[0].resolve()
    folder = folder.parent if folder.name in NETWORK_FOLDERS else folder
    index = pipeline_index(folder)
    for name in AUTOENCODER_FOLDERS:
        if (folder / name / "config.json").is_file():
            return folder / name
        check(index.get(name) in (None, [None, None]), f"{folder} has no {name}/config.json; download the whole pipeline")
    return None


def check_supported(checkpoint) -> None:
    """Raises `UserError` if `checkpoint` holds an adapter, or a pipeline of another transformer (FLUX)."""
    path = local_model(checkpoint)
    if path.is_file():
        open_model_file(path)
        return
    check(not _is_adapter(path), f"{path} {IS_AN_ADAPTER}")
    folder, config = network_config(path) or (path / "transformer", {})
    if folder.name == "transformer" and folder.is_dir():
        name = pipeline_index(path).get("_class_name", "")
        kind, norm = config.get("_class_name"), config.get("norm_type")
        check(
            kind in (_DIT, _SD3) or (kind == _FORMER_DIT and norm == "ada_norm_zero"),
            f"{path} holds a {name or 'transformer'}, which is not supported; give a Stable Diffusion 1.x, 2.x, XL or 3 folder, "
            "another model with a UNet, or a DiT",
        )


def _is_adapter(path: Path) -> bool:
    whole = (path / "config.json").is_file() or (path / "model_index.json").is_file() or network_config(path) is not None
    return path.is_dir() and not whole and any(found for pattern in _ADAPTERS for found in path.glob(pattern))
