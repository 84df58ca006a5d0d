"""Forget images that a diffusers checkpoint was trained on, in Python: folders in, folder out.

    python examples/forget_an_image.py MODEL_FOLDER IMAGE_FOLDER OUT_FOLDER NAME [NAME ...]

Each NAME is a file in IMAGE_FOLDER. In PyTorch, `diffusers.UNet2DModel.from_pretrained(OUT_FOLDER)` reads the result. The command
(docs/guide/your-images.md) does the same with checkpoints, samples, metrics and a report.
"""

import sys

import jax
import numpy as np

from retrack_jax.api import unlearn
from retrack_jax.checkpoints import export_diffusers, import_diffusers, read_schedule_config
from retrack_jax.data.sources.load import load_images
from retrack_jax.diffusion import Schedule


def main(model_folder: str, image_folder: str, out_folder: str, *names: str, num_steps: int = 40, batch_size: int = 16) -> None:
    module, params = import_diffusers(model_folder)
    schedule = Schedule.from_config(read_schedule_config(model_folder))
    size = {"resolution": module.sample_size, "channels": module.in_channels}
    data = load_images({"source": "folder", "dir": image_folder, **size})
    is_forgotten = np.isin(data.ids, names)
    if is_forgotten.sum() < len(set(names)):
        raise SystemExit(f"not in {image_folder}: {', '.join(sorted(set(names) - set(data.ids)))}")
    params = unlearn(
        module.apply, params, schedule, data.images[~is_forgotten], data.images[is_forgotten], method="retrack",
        rng=jax.random.key(0), num_steps=num_steps, batch_size=batch_size, learning_rate=5e-6, lam=0.005,
        callback=lambda step, metrics: print(step, {name: round(float(value), 3) for name, value in metrics.items()}),
    )  # fmt: skip
    export_diffusers(out_folder, module, params, schedule=schedule, source=model_folder, note=f"forgot {', '.join(names)}")


if __name__ == "__main__":
    if len(sys.argv) < 5:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
