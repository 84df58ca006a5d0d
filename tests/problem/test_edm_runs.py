"""Whole commands with a UNet whose folder has EDM's scheduler, and what ends in one line."""

import json

import numpy as np

from retrack_jax.checkpoints import export_diffusers, import_diffusers, read_schedule_config
from retrack_jax.checkpoints.diffusers_import import example_inputs
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.main import main
from retrack_jax.models.unet2d import UNet2D
from tests.messages import error_of
from tests.tiny import flags
from tests.tiny_sd import hasty_compiler
from tests.tiny_xl import random_params

BLOCKS = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
SMALL = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "add_attention": False, "norm_num_groups": 4}
METRICS = ("frequency", "nll_bits_per_dim", "forget_loss", "sscd")


def checkpoint(folder, schedule, **options):
    module = UNet2D.from_config({**BLOCKS, **SMALL, "layers_per_block": 1, **options})
    export_diffusers(folder, module, random_params(module, 0, *example_inputs(module)), schedule=schedule)
    return folder


def run(tmp_path, method="retrack", **fields) -> int:
    fields = {"sampling.sampler": "euler", "eval.metrics": METRICS, **fields}
    return main(["retrack_jax", f"--config=configs/digits_tshirt.py:{method}", *flags(tmp_path / "run", **fields)])


def test_a_checkpoint_of_edm_forgets_and_is_exported(tmp_path):
    schedule = Schedule.create(class_name="EDMDPMSolverMultistepScheduler", sigma_max=20.0, num_train_timesteps=500)
    folder = checkpoint(tmp_path / "model", schedule)
    assert not (folder / "model_index.json").exists()  # no pipeline of diffusers scales the input of an unconditional UNet
    with hasty_compiler():
        assert run(tmp_path, checkpoint=folder) == 0
    (result,) = (tmp_path / "run" / "retrack").glob("seed0-*")
    metrics = json.loads((result / "metrics.json").read_text())
    assert set(metrics["unlearned"]) == set(METRICS) - {"sscd"} and np.isfinite([*metrics["unlearned"].values()]).all()
    assert "which this model has not" in metrics["provenance"]["absent"]["sscd"]
    assert metrics["provenance"]["metrics"]["nll_bits_per_dim"]["mode"] == "edm"
    before, after = (import_diffusers(each) for each in (folder, result / "diffusers"))
    assert before[0] == after[0] and not np.array_equal(before[1]["conv_in"]["kernel"], after[1]["conv_in"]["kernel"])
    assert Schedule.from_config(read_schedule_config(result / "diffusers")).to_config() == schedule.to_config()


def test_bad_combinations_end_in_one_line(tmp_path, capsys):
    folder = checkpoint(tmp_path / "model", Schedule.edm())
    assert run(tmp_path, **{"checkpoint": folder, "sampling.sampler": "ddpm"}) == 2
    assert "the schedule is EDM's; set config.sampling.sampler to euler or dpm_solver" in error_of(capsys)
    assert run(tmp_path, **{"unlearn.log_normal": "(0.0,1.0)", "eval.metrics": ("frequency",)}) == 2
    assert "config.unlearn.log_normal is (0.0, 1.0), which is for EDM's sigmas" in error_of(capsys)
    folder = checkpoint(tmp_path / "other", Schedule.edm(), time_embedding_type="learned", num_train_timesteps=1000)
    assert run(tmp_path, checkpoint=folder) == 2
    assert "the times of flows and of EDM are no whole numbers" in error_of(capsys)
    folder = checkpoint(tmp_path / "third", Schedule.edm(), out_channels=2)
    assert run(tmp_path, checkpoint=folder) == 2
    assert "the schedule is EDM's, whose networks make no variance" in error_of(capsys)
