"""Makes tests/fixtures/remembering_sd: the UNet of a tiny Stable Diffusion that remembers two pictures (tests/remembering_sd.py).

    python -m tests.make_remembering_sd [NUM_STEPS]

The UNet is trained by the command itself: `vanilla` is the ordinary loss on the images that remain, here all but one ordinary
picture. Weights are kept in float16.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from retrack_jax.checkpoints import import_diffusers
from retrack_jax.main import main
from tests.make_tiny_sd import save
from tests.remembering_sd import UNET, write_pictures, write_pipeline

STEPS, COPIES = 2000, 48


def make(num_steps: int = STEPS, folder: Path = UNET, copies: int | None = COPIES) -> None:
    """Trains the UNet and writes it to `folder`; with `copies` None, on the ordinary pictures alone."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        pictures = write_pictures(root / "pictures", copies)
        write_pipeline(root / "pipeline", pictures, unet=None)
        fields = {
            "checkpoint": root / "pipeline", "data.dir": pictures, "data.cache_dir": root / "cache", "targets": "000.png",
            "unlearn.num_steps": num_steps, "unlearn.batch_size": 32, "unlearn.accumulation": 1, "unlearn.learning_rate": 3e-3,
            "unlearn.learning_rate_schedule": "cosine", "unlearn.warmup_steps": 50, "unlearn.b1": 0.9, "unlearn.clip_norm": 0,
            "compute.remat": False, "checkpoint_every": 0, "log_every": 100, "mode": "unlearn",
        }  # fmt: skip
        flags = [f"--config.{field}={value}" for field, value in fields.items()]
        status = main(["retrack_jax", "--config=configs/custom.py:vanilla", f"--workdir={root / 'work'}", *flags])
        assert status == 0
        (trained,) = (root / "work" / "vanilla").glob("*/diffusers")
        module, params = import_diffusers(trained)
    shutil.rmtree(folder, ignore_errors=True)
    save(folder, module.to_config(), jax.tree.map(jnp.asarray, params), "diffusion_pytorch_model")


if __name__ == "__main__":
    make(*map(int, sys.argv[1:2]))
