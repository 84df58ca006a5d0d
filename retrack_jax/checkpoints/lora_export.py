"""An adapter as the file that diffusers' `pipe.load_lora_weights` reads: peft's names after the network's, and settings."""

import json

from etils import epath

from retrack_jax.checkpoints.diffusers_export import LORA_WEIGHTS, card_and_licenses, replacing, write_files
from retrack_jax.files import write_whole
from retrack_jax.notation import PyTree
from retrack_jax.weights.names import to_torch
from retrack_jax.weights.safetensors_io import write_safetensors

_HOW = "This is an adapter (LoRA): load the base model in diffusers, then call `pipe.load_lora_weights` with this folder."


def export_lora(
    path, adapter: PyTree, *, rank: int, alpha: float, network: str = "unet", source=None, note: str | None = None
) -> None:
    """Writes the folder `path`: `pytorch_lora_weights.safetensors`, the base model's licenses and a model card.

    Args:
      path: as `export_diffusers` takes it.
      adapter: a tree of train/lora.py, of the network of a Stable Diffusion pipeline.
      rank, alpha: A B is multiplied by alpha / rank. Tensors do not tell alpha: diffusers reads it from the file's metadata, and
        readers that do not know these take alpha = rank.
      network: the name of the network's folder in the pipeline, `unet` or `transformer`.
      source: the folder of the base model.
      note: what was forgotten and how, for the model card.

    Raises:
      UserError: as `export_diffusers`.
    """
    tensors = [tensor._replace(name=f"{network}.{tensor.name}") for tensor in to_torch(adapter)]
    layers = sorted({tensor.name.removeprefix(f"{network}.").partition(".lora_")[0] for tensor in tensors})
    whole = int(alpha) if alpha == int(alpha) else alpha
    settings = {f"{network}.r": rank, f"{network}.lora_alpha": whole, f"{network}.target_modules": layers}
    metadata = {"lora_adapter_metadata": json.dumps(settings, indent=2, sort_keys=True)}
    with replacing(epath.Path(path), source) as folder:
        write_files(folder, card_and_licenses(source, "\n\n".join(text for text in (_HOW, note) if text)))
        write_whole(folder / LORA_WEIGHTS, lambda temporary: write_safetensors(temporary, tensors, metadata))
