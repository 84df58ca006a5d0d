"""An unconditional latent pipeline with every method: one program each to compile, too long for `make test`."""

import jax
import numpy as np
import pytest

from retrack_jax.checkpoints import import_diffusers
from retrack_jax.main import main
from retrack_jax.unlearn.methods import METHODS
from tests.tiny_latent import flags, write_pictures, write_pipeline
from tests.tiny_sd import hasty_compiler


@pytest.mark.parametrize("coder", ["vqvae", "vae"])
def test_every_method_changes_the_unet(tmp_path, coder):
    write_pipeline(tmp_path / "model", coder)
    write_pictures(tmp_path / "pictures")
    argv = flags(tmp_path, mode="unlearn", unlearn__num_steps=1)
    argv[1] = "--config=configs/custom.py:all"
    with hasty_compiler():
        assert main(argv) == 0
    before = import_diffusers(tmp_path / "model")[1]
    for method in (name for name, entry in METHODS.items() if not entry.from_scratch):
        (exported,) = (tmp_path / "work" / method).glob("*/diffusers")
        assert (exported / coder / "config.json").is_file()
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, import_diffusers(exported)[1])
        assert 0 < max(jax.tree.leaves(moved)) < 0.1, method
