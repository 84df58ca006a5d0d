"""`config.sampling.preset` stands for a sampler and a number of steps: these are recorded, and others next to it are refused."""

import json

import pytest

from retrack_jax.checks import UserError
from retrack_jax.cli.flags import parse
from retrack_jax.config import presets
from retrack_jax.config.presets import with_preset
from retrack_jax.config.reading import read_config
from retrack_jax.main import main
from tests.data.checking import config_of
from tests.messages import error_of
from tests.tiny import flags

QUICK = "--config.sampling.preset=quick"
BETAS, FLOW = presets._PRESETS["quick"]


def tiny(workdir, *more: str) -> list[str]:
    own = [flag for flag in flags(workdir) if not flag.startswith("--config.sampling.num_steps")]
    return ["retrack_jax", "--config=configs/digits_tshirt.py", *own, *more]


def chosen(name: str, *more: str) -> tuple[str, int]:
    sampling = with_preset(read_config(parse(["retrack_jax", f"--config=configs/{name}.py", *more])[0])).sampling
    assert sampling.preset == ""
    return sampling.sampler, sampling.num_steps


def test_the_sampler_is_recorded_and_the_same_run_continues_without_the_preset(tmp_path, capsys):
    assert main(tiny(tmp_path, QUICK)) == 0
    run = tmp_path / "retrack" / "seed0-label_10"
    sampling = json.loads((run / "config.json").read_text())["samples"]["sampling"]
    assert (sampling["sampler"], sampling["num_steps"]) == BETAS and "preset" not in sampling
    drawn = (run / "samples.npz").stat().st_mtime_ns
    by_hand = [f"--config.sampling.{field}={value}" for field, value in zip(("sampler", "num_steps"), BETAS, strict=True)]
    assert main(tiny(tmp_path, *by_hand)) == 0 and (run / "samples.npz").stat().st_mtime_ns == drawn
    assert "config.sampling.num_steps" in error_of(capsys, tiny(tmp_path, "--config.sampling.num_steps=50"))


def test_it_takes_the_place_of_what_the_config_file_has():
    assert chosen("digits_tshirt") == ("ddpm", 50) and chosen("cifar10")[1] == 1000
    assert chosen("digits_tshirt", QUICK) == chosen("cifar10", QUICK) == chosen("custom", QUICK) == BETAS
    assert chosen("digits_flow", QUICK) == FLOW
    assert chosen("digits_tshirt", QUICK, f"--config.sampling.sampler={BETAS[0]}") == BETAS


@pytest.mark.parametrize("mode", ["run", "check"])
@pytest.mark.parametrize("flag", ["sampler=ddpm", "num_steps=7"])
def test_another_sampler_or_number_of_steps_is_refused(flag, mode, tmp_path, capsys):
    field, _, value = flag.partition("=")
    own = value if value.isdigit() else repr(value)
    line = error_of(capsys, tiny(tmp_path, QUICK, f"--config.sampling.{flag}", f"--config.mode={mode}"))
    assert f"but config.sampling.{field} is {own}; leave out the preset or that field" in line


def test_a_config_in_python_must_leave_both_open():
    config = config_of("cifar10")
    config.sampling.preset = "quick"
    with pytest.raises(UserError, match="but config.sampling.sampler is 'ddpm'"):
        with_preset(read_config(config))
    config.sampling.sampler = config.sampling.num_steps = None
    assert with_preset(read_config(config)).sampling.sampler == BETAS[0]
    config.sampling.preset = ""
    with pytest.raises(UserError, match="config.sampling.num_steps is None; give a number, or a preset"):
        read_config(config)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, FLOW),
        ({"_class_name": "PNDMScheduler", "prediction_type": "v_prediction"}, BETAS),
        ({"_class_name": "EDMEulerScheduler"}, BETAS),
        ({"_class_name": "LCMScheduler"}, "has no sampler for LCMScheduler"),
    ],
)
def test_the_checkpoints_schedule_decides(scheduler, expected, tmp_path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (tmp_path / "unet").mkdir()
    if isinstance(expected, tuple):
        assert chosen("custom", QUICK, f"--config.checkpoint={tmp_path}") == expected
        return
    with pytest.raises(UserError, match=expected):
        chosen("custom", QUICK, f"--config.checkpoint={tmp_path}")


def test_a_preset_that_is_not_there(capsys, tmp_path):
    line = error_of(capsys, tiny(tmp_path, "--config.sampling.preset=quik"))
    assert "config.sampling.preset is 'quik'; choose one of '' (none), quick" in line
