"""Whole commands with flows: the transformer of the demo, a checkpoint with its scheduler's file, and what ends in one line."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrack_jax.checkpoints import export_diffusers, import_diffusers, read_schedule_config
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.main import main
from retrack_jax.models.dit import DiT
from tests.messages import error_of
from tests.tiny import flags

SIZES = {"unlearn.retrack.batch_size": 8, "unlearn.retrack.forget_batch_size": 8}
TINY = {"dit.num_layers": 1, "dit.num_attention_heads": 1, "dit.attention_head_dim": 8, **SIZES}
METRICS = ("frequency", "nll_bits_per_dim", "forget_loss")


def run(tmp_path, method="retrack", **fields) -> int:
    fields = {**TINY, "eval.metrics": METRICS, **fields}
    return main(["retrack_jax", f"--config=configs/digits_flow.py:{method}", *flags(tmp_path / "run", **fields)])


def checkpoint(folder, schedule, **options):
    small = {"num_attention_heads": 1, "attention_head_dim": 8, "num_layers": 1, "in_channels": 1, "sample_size": 8}
    module = DiT.from_config({**small, "num_embeds_ada_norm": 1, **options})
    inputs = jnp.zeros((1, 8, 8, 1)), jnp.zeros((1,)), *module.smallest_label
    export_diffusers(folder, module, jax.jit(module.init)(jax.random.key(0), *inputs)["params"], schedule=schedule)
    return folder


@pytest.mark.parametrize("method", ["retrack", "retrain"])
def test_a_run_of_the_demo_from_pretraining_to_the_export(method, tmp_path):
    assert run(tmp_path, method) == 0
    (folder,) = (tmp_path / "run" / method).glob("seed0-*")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(METRICS) == set(metrics["unlearned"]) and np.isfinite([*metrics["unlearned"].values()]).all()
    assert metrics["provenance"]["metrics"]["nll_bits_per_dim"]["mode"] == "flow"
    module, _ = import_diffusers(folder / "diffusers")
    assert isinstance(module, DiT)
    assert Schedule.from_config(read_schedule_config(folder / "diffusers")).is_flow


def test_a_checkpoint_brings_its_own_schedule(tmp_path):
    """A shifted flow, Heun's method, and metrics that restore images have no value and say why."""
    folder = checkpoint(tmp_path / "model", Schedule.rectified_flow(shift=3.0))
    fields = {"checkpoint": folder, "sampling.sampler": "flow_heun", "schedule.prediction_type": "epsilon"}
    assert run(tmp_path, **fields, **{"eval.metrics": ("frequency", "sscd")}) == 0
    (result,) = (tmp_path / "run" / "retrack").glob("seed0-*")
    metrics = json.loads((result / "metrics.json").read_text())
    assert set(metrics["unlearned"]) == {"frequency"} and "which this model has not" in metrics["provenance"]["absent"]["sscd"]
    written = json.loads((result / "diffusers" / "scheduler" / "scheduler_config.json").read_text())
    assert written == {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


def test_a_learned_variance_is_trained_around_and_sampled_with(tmp_path):
    folder = checkpoint(tmp_path / "model", Schedule.create(variance_type="learned_range"), out_channels=2)
    assert run(tmp_path, **{"checkpoint": folder, "sampling.sampler": "ddpm", "eval.metrics": ("frequency",)}) == 0
    (result,) = (tmp_path / "run" / "retrack").glob("seed0-*")
    module, _ = import_diffusers(result / "diffusers")
    assert module.out_channels == 2
    assert Schedule.from_config(read_schedule_config(result / "diffusers")).variance_type == "learned_range"


def test_bad_combinations_end_in_one_line(tmp_path, capsys):
    assert run(tmp_path, **{"sampling.sampler": "ddpm"}) == 2
    assert "set config.sampling.sampler to flow_euler or flow_heun" in error_of(capsys)
    assert run(tmp_path, **{"schedule.prediction_type": "epsilon"}) == 2
    assert "the samplers flow_euler and flow_heun are for flows" in error_of(capsys)
    folder = checkpoint(tmp_path / "model", Schedule.rectified_flow(), out_channels=2)
    assert run(tmp_path, checkpoint=folder) == 2
    assert "eps and its variance, and the schedule is a flow's" in error_of(capsys)
    dynamic = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
    assert run(tmp_path, checkpoint=checkpoint(tmp_path / "model", dynamic)) == 2
    assert "sets use_dynamic_shifting to True; flows are supported without it" in error_of(capsys)


def test_flux_is_refused_by_name(tmp_path, capsys):
    (tmp_path / "flux" / "transformer").mkdir(parents=True)
    (tmp_path / "flux" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert run(tmp_path, checkpoint=tmp_path / "flux") == 2
    assert "holds a FluxPipeline, which is not supported" in error_of(capsys)
