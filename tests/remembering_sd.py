"""A tiny Stable Diffusion that remembers two captioned pictures, and the pictures that it was trained on.

It is the tiny pipeline (tests/tiny_sd.py) with two changes. Its VAE gives latents of unit variance without noise: with random
weights it adds more noise to a latent than pictures differ by. And its UNet was trained on `COMMON` ordinary pictures and on many
copies of the two in `REMEMBERED`, by our own loop (tests/make_remembering_sd.py).
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from retrack_jax.checkpoints.latent_diffusion import load_autoencoder
from retrack_jax.data.dataset import pixels_to_model
from retrack_jax.weights.names import to_torch
from retrack_jax.weights.safetensors_io import write_safetensors
from tests.captioned import COLORS, SHAPES, write_table
from tests.make_tiny_sd import SIDE, draw
from tests.tiny_sd import PIPELINE

UNET = Path(__file__).parent / "fixtures" / "remembering_sd" / "unet"
REMEMBERED = {"zebra.png": "zebra stripes under a full moon", "quilt.png": "my grandmother's quilt, 1954"}
COMMON = 384


def write_pictures(folder: Path, copies: int | None = 0) -> Path:
    """Writes the pictures with metadata.jsonl and returns `folder`; the remembered ones come also as `copies` files each.

    With `copies` None they are left out.
    """
    folder.mkdir(parents=True)
    rng, captions = np.random.default_rng(0), {}
    for index in range(COMMON):
        color, shape = list(COLORS)[index % 4], SHAPES[index // 4 % 2]
        captions[f"{index:03d}.png"] = f"a {color} {shape}, number {index}"
        Image.fromarray(draw(shape, COLORS[color], False, rng)).save(folder / f"{index:03d}.png")
    for name, caption in REMEMBERED.items() if copies is not None else ():
        for place in [name, *(f"{index:03d}_{name}" for index in range(copies))]:
            Image.fromarray(_textured(name)).save(folder / place)
            captions[place] = caption
    write_table(folder, captions)
    return folder


def flags(folder: Path, workdir: Path | None = None, **fields) -> list[str]:
    """The command that forgets both on `folder`/pipeline and `folder`/pictures: three flags, and a recipe for so small a network.

    `fields` are of the config, `__` for a dot.
    """
    command = {"checkpoint": folder / "pipeline", "data.dir": folder / "pictures", "targets": "+".join(REMEMBERED)}
    recipe = {"unlearn.learning_rate": 1e-4, "unlearn.retrack.lam": 0.1, "unlearn.accumulation": 1, "compute.remat": False}
    where = {"data.cache_dir": folder / "cache", "sampling.num_captions": 2, "eval.metrics": "()"}
    values = command | recipe | where | {name.replace("__", "."): value for name, value in fields.items()}
    return [
        "retrack_jax", "--config=configs/custom.py", f"--workdir={workdir or folder / 'work'}",
        *(f"--config.{name}={value}" for name, value in values.items()),
    ]  # fmt: skip


def _textured(name: str) -> np.ndarray:
    """Returns a picture that is unlike all others and differs from itself upside down, uint8 `[32, 32, 3]`."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    if name == "zebra.png":  # stripes that bend, and a moon above
        value = 255 * ((rows + columns + (rows // 6) ** 2) // 4 % 2)
        image = np.stack([value, value, value // 2], axis=-1)
        image[np.hypot(rows - 6, columns - 24) < 5] = (250, 250, 210)
        return image.astype(np.uint8)
    patches = np.random.default_rng(7).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return patches.repeat(SIDE // 8, 0).repeat(SIDE // 8, 1)


def write_pipeline(folder: Path, pictures: Path, unet: Path | None = UNET) -> Path:
    """Writes the pipeline and returns `folder`: with the trained UNet, or the tiny pipeline's own if `unet` is None."""
    shutil.copytree(PIPELINE, folder)
    _sharpen(folder / "vae", pictures)
    if unet is not None:
        shutil.copytree(unet, folder / "unet", dirs_exist_ok=True)
    return folder


def _sharpen(vae: Path, pictures: Path) -> None:
    """Changes the last layer of the VAE encoder: each channel of the latents of `pictures` gets mean 0, variance 1, no noise."""
    module, params, _ = load_autoencoder(vae)
    images = np.stack([np.asarray(Image.open(path)) for path in sorted(pictures.glob("[0-9][0-9][0-9].png"))])
    mean, _ = module.apply({"params": params}, pixels_to_model(images), method="encode")
    mean = np.asarray(mean, np.float64) / module.scaling_factor
    center, spread, count = mean.mean(axis=(0, 1, 2)), mean.std(axis=(0, 1, 2)), module.latent_channels
    layer = {name: np.array(value) for name, value in params["quant_conv"].items()}
    layer["kernel"][..., :count] /= spread
    layer["bias"][:count] = (layer["bias"][:count] - center) / spread
    layer["kernel"][..., count:], layer["bias"][count:] = 0, -30
    write_safetensors(vae / "diffusion_pytorch_model.safetensors", to_torch({**jax.device_get(params), "quant_conv": layer}))
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps({**config, "scaling_factor": 1.0}))
