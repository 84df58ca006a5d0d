"""Test set-up: four CPU devices, strict dtypes and ranks, and the compilation cache; and the tiny Stable Diffusion's files.

Four devices are forced before any array exists, so that every test of devices runs on a plain machine. Implicit dtype or rank
promotion is an error: it is how float64 and silent broadcasting slip into losses.
"""

import os
import shutil
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["HF_HUB_OFFLINE"] = "1"  # tests/weights/test_hub.py starts a server in place of the hub

import jax
import numpy as np
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/retrack_jax/tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
assert jax.device_count() == 4  # jax has started: a command that a test runs in this process can no longer choose another number


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
    """XLA maps each compiled program several times, and Linux allows a process 65,530 maps: the next program aborts it."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()


@pytest.fixture
def rng():
    """The key that tests start from."""
    return jax.random.key(0)


@pytest.fixture(scope="session")
def pipeline():
    """The tiny Stable Diffusion, loaded once."""
    from retrack_jax.checkpoints.stable_diffusion import load_pipeline

    return load_pipeline(tiny_sd().PIPELINE)


@pytest.fixture(scope="session")
def recorded_sd():
    """What diffusers and transformers give for the tiny Stable Diffusion."""
    with np.load(tiny_sd().RECORDED) as archive:
        return {name: archive[name] for name in archive.files}


@pytest.fixture
def concepts(tmp_path):
    """A copy of the concepts that a test may spoil."""
    return shutil.copytree(tiny_sd().CONCEPTS, tmp_path / "concepts")


@pytest.fixture
def pipeline_folder(tmp_path):
    """A copy of the tiny Stable Diffusion's folder that a test may spoil."""
    return shutil.copytree(tiny_sd().PIPELINE, tmp_path / "pipeline")


def tiny_sd():
    """The module tests/tiny_sd.py; it imports the whole package, which most tests do without."""
    from tests import tiny_sd

    return tiny_sd


from tests.image_files import jpeg_folder, parquet_file, tfds_dir  # noqa: E402, F401 (fixtures)
