"""Draws docs/images/before_after.png: samples before and after from the same noise, the neighbors, and what each model takes the
noised image for.

    python -m tests.benchmarks.before_after --config=configs/mnist5k_tshirt.py --workdir=runs/mnist5k [--out=FILE]

A model's estimate of the clean image is (x_t - sigma eps) / gamma, from one call of the network. The models are the pretrained
one, that of the config's method and first seed, and the retrained one, as far as the workdir has them.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from retrack_jax.checkpoints import import_diffusers
from retrack_jax.data.dataset import pixels_to_model, unit_to_pixels
from retrack_jax.report.catalogue import method_label
from retrack_jax.report.grids import grid, samples_picture, save_png
from retrack_jax.run import samples
from tests.benchmarks.opened import opened

LEVELS = (100, 250, 500, 750)  # timesteps of 1000
_MARGIN, _LABEL, _LINE = 24, 210, 26  # pixels


def estimates(denoiser, params, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns `image` `[H, W, 1]` noised to each of `LEVELS`, and the estimates of it, both uint8 `[4, H, W, 1]`."""
    t = jnp.array(LEVELS)
    gamma, sigma = (table[t][:, None, None, None] for table in (denoiser.schedule.gamma, denoiser.schedule.sigma))
    x_t = gamma * pixels_to_model(image)[None] + sigma * jax.random.normal(jax.random.key(0), (len(LEVELS), *image.shape))
    x_0 = (x_t - sigma * jax.jit(denoiser.eps_fn)(params, x_t, t)) / gamma
    return tuple(unit_to_pixels(np.clip(np.asarray(x) / 2 + 0.5, 0, 1)) for x in (x_t, x_0))


def strip(title: str, rows: dict[str, np.ndarray]) -> Image.Image:
    """Returns rows of pictures, each with its name on the left, under `title` and a line that names the noise levels."""
    pictures = {name: grid(images, columns=len(LEVELS), smallest=64) for name, images in rows.items()}
    height, width = next(iter(pictures.values())).shape[:2]
    canvas = Image.new("RGB", (_LABEL + width + 2 * _MARGIN, 2 * _LINE + height * len(pictures) + _MARGIN), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    draw.text((_MARGIN, 0), title, "black", ImageFont.load_default(16))
    for column, t in enumerate(LEVELS):
        draw.text((_LABEL + _MARGIN + 12 + column * (width // len(LEVELS)), _LINE), f"t = {t}", "dimgray", font)
    for row, (name, picture) in enumerate(pictures.items()):
        top = 2 * _LINE + row * height
        draw.text((_MARGIN, top + height // 2 - 8), name, "black", font)
        tiles = Image.fromarray(picture)
        canvas.paste(tiles, (_LABEL + _MARGIN, top), tiles)
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/images/before_after.png", type=Path)
    options, rest = parser.parse_known_args()
    context, params = opened(rest)
    problem, workdir, (target,) = context.problem, context.workdir, context.targets.values()
    method = problem.options.method
    image = np.asarray(target.images.images[target.unique[0]])
    noised, before = estimates(problem.denoiser, params, image)
    name = problem.options.eval.mark_name
    rows = {f"the {name}, noised": noised, "before unlearning": before}
    for made_by in (method, "retrain"):
        if (folder := workdir.run(made_by, problem.options.seeds[0], target.slug) / "diffusers").exists():
            label = "retrained without it" if made_by == "retrain" else f"after {method_label(made_by)}"
            rows[label] = estimates(problem.denoiser, import_diffusers(folder)[1], image)[1]
    parts = [strip(f"The {name} with noise, and what each model takes that for", rows)]
    run = workdir.run(method, problem.options.seeds[0], target.slug)
    if (run / "samples.npz").exists():
        drawn = samples.read(workdir.pretrained), samples.read(run)
        pictures = problem.evaluation.pictures(target, *drawn)
        pictures.pop("labels", None)  # which a page shows as a table
        parts.insert(0, samples_picture(**pictures, count=32, titles=("Before", f"After {method_label(method)}")))
    canvas = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    for row, part in enumerate(parts):
        canvas.paste(part, (0, sum(other.height for other in parts[:row])))
    save_png(options.out, canvas.quantize(64))


if __name__ == "__main__":
    main()
