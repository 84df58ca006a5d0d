"""Test set-up: four CPU devices, strict dtypes and ranks, and the compilation cache.

Four devices are forced before any array exists, so that every test of devices runs on a plain machine. Implicit dtype or rank
promotion is an error: it is how float64 and silent broadcasting slip into losses.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/retrack_jax/tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture
def rng():
    """The key that tests start from."""
    return jax.random.key(0)


from tests.image_files import jpeg_folder, parquet_file, tfds_dir  # noqa: E402, F401 (fixtures)
