"""The tiny Stable Diffusion: where its files lie (made by tests/make_tiny_sd.py), and the config of a run on them."""

import contextlib
from pathlib import Path

import jax

from configs import stable_diffusion

ROOT = Path(__file__).parent / "fixtures" / "tiny_sd"
PIPELINE = ROOT / "pipeline"
CONCEPTS = ROOT / "concepts"
RECORDED = Path(__file__).parent / "fixtures" / "sd_parity.npz"


def tiny_config(tmp_path, method="retrack"):
    """Returns configs/stable_diffusion.py at the size of the tiny pipeline; files go below `tmp_path`."""
    config = stable_diffusion.get_config(method)
    with config.unlocked():
        config.targets = ("red_circle",)
        config.checkpoint = str(PIPELINE)
        config.data.dir = str(CONCEPTS)
        config.data.cache_dir = str(tmp_path / "cache")
        config.data.resolution = 32
        config.unlearn.num_steps = 2
        config.unlearn.batch_size = 4
        config.unlearn.accumulation = 1  # microbatches are tested in tests/train; here they double the time to compile
        config.unlearn.num_neighbors = 3
        config.unlearn.learning_rate = 1e-3
        config.sampling.num_steps = 2
        config.sampling.num_images = 4
        config.sampling.batch_size = 4
        config.eval.weights_dir = str(tmp_path / "weights")
        config.compute.remat = False  # halves the time to compile
        config.log_every = 1
        config.export = "pipeline"
    return config


@contextlib.contextmanager
def hasty_compiler():
    """Compiles without most optimizations: a program that runs once or twice would spend most of its time on them."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
