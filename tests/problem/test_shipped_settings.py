"""What the config ships with and the other tests turn off to save time: accumulation, remat and the export of the UNet."""

import jax
import jax.numpy as jnp
import pytest

from retrack_jax.api import run
from retrack_jax.checkpoints import import_diffusers
from retrack_jax.run import training
from retrack_jax.train.loop import Preempted
from tests.tiny_sd import hasty_compiler, tiny_config


@pytest.fixture(scope="module")
def unlearned(tmp_path_factory):
    """The folder of a run that was stopped after one of its two steps and continued; how often that took the first parameters."""
    tmp_path = tmp_path_factory.mktemp("shipped")
    config = tiny_config(tmp_path)
    with config.unlocked():
        config.mode = "unlearn"
        config.unlearn.batch_size = 8
        config.unlearn.accumulation = 2
        config.compute.remat = True
        config.export = "unet"
    folder = tmp_path / "work" / "retrack" / "seed0-red_circle"
    reads, original = [], training.pretrained
    with hasty_compiler(), pytest.MonkeyPatch.context() as patch:
        with pytest.raises(Preempted, match="step 1 of 2"):
            run(config, tmp_path / "work", should_stop=(folder / "log.jsonl").exists)  # after the first step
        patch.setattr(training, "pretrained", lambda *arguments: reads.append(1) or original(*arguments))
        run(config, tmp_path / "work")
    return folder, len(reads)


def test_a_run_that_continues_takes_no_second_copy_of_the_parameters(unlearned):
    folder, reads = unlearned
    assert reads == 0
    assert len((folder / "log.jsonl").read_text().splitlines()) == 2


def test_the_exported_unet_is_unlearned_and_carries_the_licence(unlearned, pipeline):
    folder = unlearned[0] / "diffusers"
    module, params = import_diffusers(folder)
    assert type(module) is type(pipeline.unet) and not (folder / "unet").exists()
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), params, pipeline.unet_params)
    assert 0 < max(jax.tree.leaves(moved)) < 0.1
    assert (folder / "LICENSE").is_file() and (folder / "scheduler" / "scheduler_config.json").is_file()
    card = (folder / "README.md").read_text()
    assert "Tiny pipeline" in card and "red_circle" in card
