"""A folder of captioned pictures for the tiny Stable Diffusion, and the command line that forgets some of them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests.make_tiny_sd import draw
from tests.tiny_sd import PIPELINE

SHAPES = ("circle", "square")
COLORS = {"red": (220, 30, 40), "blue": (30, 60, 220), "gray": (140, 140, 140), "gold": (220, 180, 40)}


def captioned_pictures(folder: Path, count: int = 20) -> dict[str, str]:
    """Writes `count` pictures 32 x 32 with metadata.jsonl; returns file name -> caption. Captions tell them apart."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, captions = np.random.default_rng(0), {}
    for index in range(count):
        color, shape = list(COLORS)[index % 4], SHAPES[index // 4 % 2]
        name = f"{shape}_{index:02d}.png"
        captions[name] = f"a {color} {shape}, number {index}"
        Image.fromarray(draw(shape, COLORS[color], False, rng)).save(folder / name)
    write_table(folder, captions)
    return captions


def write_table(folder: Path, captions: dict[str, str]) -> None:
    """Writes metadata.jsonl."""
    rows = [json.dumps({"file_name": name, "text": caption}) + "\n" for name, caption in captions.items()]
    (folder / "metadata.jsonl").write_text("".join(rows))


def flags(tmp_path: Path, checkpoint: Path = PIPELINE, **fields) -> list[str]:
    """The command of the README at toy sizes; `fields` are of the config, `__` for a dot."""
    sizes = {
        "unlearn.num_steps": 2, "unlearn.batch_size": 4, "unlearn.accumulation": 1, "unlearn.num_neighbors": 3,
        "sampling.num_steps": 2, "sampling.num_captions": 2, "compute.remat": False,
    }  # fmt: skip
    sizes |= {"checkpoint": checkpoint, "data.dir": tmp_path / "pictures", "data.cache_dir": tmp_path / "cache"}
    sizes |= {"eval.weights_dir": tmp_path / "weights", **{name.replace("__", "."): value for name, value in fields.items()}}
    return [
        "retrack_jax", "--config=configs/custom.py", f"--workdir={tmp_path / 'work'}",
        *(f"--config.{name}={value}" for name, value in sizes.items()),
    ]  # fmt: skip
