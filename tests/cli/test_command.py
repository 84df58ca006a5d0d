"""The command as a user types it, in process: the whole run, the same command again, and what goes wrong."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retrack_jax.cli.flags import USAGE, parse
from retrack_jax.main import main
from tests.benchmarks import before_after
from tests.tiny import flags

CONFIG = "--config=configs/digits_tshirt.py"


def command(workdir, config=CONFIG, **more):
    return main(["retrack_jax", config, *flags(workdir, **more)])


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    assert command(workdir) == 0
    return workdir


def test_a_run_leaves_the_files_of_the_contract(done):
    run = done / "retrack" / "seed0-label_10"
    files = "config.json metrics.json log.jsonl samples.npz samples.png report.html diffusers/config.json"
    for name in files.split():
        assert (run / name).exists(), name
    metrics = json.loads((run / "metrics.json").read_text())
    assert list(metrics)[:9] == [
        "config", "method", "seed", "target", "steps", "unlearn_seconds", "pretrained", "unlearned", "retrained",
    ]  # fmt: skip
    assert metrics["steps"] == 4 and metrics["unlearn_seconds"] > 0
    assert set(metrics["pretrained"]) == set(metrics["unlearned"]) == {"frequency"}
    assert metrics["provenance"]["data"]["num_forget"] == 8
    samples = np.load(run / "samples.npz")
    assert samples["samples"].dtype == np.uint8 and samples["samples"].shape == (12, 8, 8, 1)
    np.testing.assert_array_equal(samples["samples"], np.floor(255 * samples["samples_float"]))
    assert (done / "summary.json").exists()
    assert not [path for path in done.rglob("*") if ".tmp" in path.name or "orbax-checkpoint-tmp" in path.name]


def test_the_picture_of_before_and_after_is_drawn_from_a_finished_run(done, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["before_after", CONFIG, *flags(done), f"--out={tmp_path / 'picture.png'}"])
    before_after.main()
    with Image.open(tmp_path / "picture.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert pixels.shape[0] > 300 and (pixels < 128).mean() > 0.02


def test_the_same_command_again_does_nothing_and_prints_the_table(done, capsys):
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file() and path.name != "summary.json"}
    assert command(done) == 0
    assert "Frequency" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_stages_one_at_a_time_give_the_same(done, tmp_path):
    for mode in ("pretrain", "unlearn", "sample", "eval", "report"):
        assert command(tmp_path, mode=mode) == 0
    ours, theirs = (np.load(folder / "retrack/seed0-label_10/samples.npz")["samples_float"] for folder in (tmp_path, done))
    np.testing.assert_array_equal(ours, theirs)


def test_a_stage_before_its_time_says_what_to_run(tmp_path, capsys):
    assert command(tmp_path, mode="unlearn") == 2
    assert "--config.mode=pretrain first" in error_line(capsys)
    assert not (tmp_path / "pretrained/checkpoints").exists()  # looking for a model makes no folder


def test_all_methods_share_one_pretrained_model(done, capsys):
    assert command(done, CONFIG + ":all") == 0
    summary = json.loads((done / "summary.json").read_text())
    methods = {"pretrained", "retrain", "retrack", "siss", "siss_no_is", "erasediff", "neggrad", "vanilla"}
    assert set(summary["methods"]) == methods
    assert all(entry["runs"] == 1 for entry in summary["methods"].values())
    # The run that was there before the model was retrained has its numbers too.
    for method in ("siss", "retrack"):
        metrics = json.loads((done / method / "seed0-label_10" / "metrics.json").read_text())
        assert metrics["retrained"] == json.loads((done / "retrain/seed0-label_10/metrics.json").read_text())["unlearned"]
    assert "SISS" in capsys.readouterr().out
    assert (done / "report.html").exists()


def error_line(capsys) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"config": "--config=configs/digits_tshit.py"}, "did you mean configs/digits_tshirt.py"),
        ({"config": "--config=digits_tshit"}, "did you mean digits_tshirt?"),
        ({"config": "--config=/nowhere/celebahq.py"}, "did you mean celebahq?"),
        ({"config": "--config=configs"}, "configs is a folder, no config file; give --config=FILE.py"),
        ({"config": "--config=README.md"}, "config file README.md does not end in .py"),
        ({"config": CONFIG + ":retrak"}, "did you mean 'retrack'"),
        ({"learning_rate": 1}, "did you mean --config.pretrain.learning_rate or --config.unlearn.learning_rate?"),
        ({"unlearn__lr": 1}, "config.unlearn.lr; did you mean --config.unlearn.learning_rate?"),
        ({"unlearn__num-steps": 1}, "config.unlearn.num-steps; did you mean --config.unlearn.num_steps?"),
        ({"lam": 1}, "config.lam; did you mean --config.unlearn.retrack.lam?"),
        ({"sampling__num_samples": 1}, "did you mean --config.sampling.num_images?"),
        ({"mode": "rum"}, "did you mean 'run'"),
        ({"unlearn__learning_rte": 1}, "config.unlearn.learning_rte; did you mean 'learning_rate'"),
        ({"unlearn__num_steps": "many"}, "unlearn.num_steps"),
        ({"unlearn__num_steps": 0}, "unlearn.num_steps is 0"),
        ({"unlearn__retrack__lam": 1.5}, "config.unlearn.retrack.lam is 1.5"),
        ({"unlearn__lam": 0.1}, "did you mean --config.unlearn.retrack.lam"),
        ({"unlearn__batch_size": 6}, "does not divide evenly over 4 devices"),
        ({"unlearn__learning_rate": -1}, "learning_rate"),
        ({"unlearn__num_neighbors": 5000}, "only 1797 images remain"),
        ({"targets": "label:11"}, "label"),
        ({"targets": "*"}, "whole set"),
        ({"sampling__sampler": "eular"}, "did you mean 'euler'"),
        ({"compute__dtype": "float16"}, "float16"),
        ({"checkpoint": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"config": CONFIG + ":all", "unlearn__forget_batch_size": 4}, "config.unlearn.forget_batch_size is 4"),
        ({"unlearn__t_max": 1001}, "config.unlearn.t_max is 1001"),
    ],
)
def test_mistakes_get_one_line_and_status_2(changes, words, done, tmp_path, capsys):
    assert command(tmp_path, **changes) == 2
    assert words in error_line(capsys)


def test_a_checkpoint_whose_recipe_is_not_known_cannot_be_retrained(tmp_path, capsys):
    assert main(["retrack_jax", "--config=configs/celebahq.py:retrain", f"--workdir={tmp_path}"]) == 2
    assert "is not in this config; set config.pretrain.num_steps, batch_size and learning_rate to it, or choose" in error_line(
        capsys
    )


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--unlearn.num_steps=3", "there is no flag --unlearn.num_steps; did you mean --config.unlearn.num_steps?"),
        ("--num-steps=3", "--config.pretrain.num_steps or --config.sampling.num_steps or --config.unlearn.num_steps?"),
        ("--mode=check", "did you mean --config.mode?"),
        ("--seed=1", "did you mean --config.seeds?"),
        ("--method=siss", "name it behind the config file, --config=configs/digits_tshirt.py:METHOD"),
        ("--output_dir=x", "did you mean --workdir?"),
    ],
)
def test_a_flag_that_there_is_not_names_the_field(flag, words, capsys):
    assert main(["retrack_jax", CONFIG, flag]) == 2
    assert words in error_line(capsys)


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "has no function get_config(method)"),
        ("def get_config(method=None):\n    pass\n", "returns None; it must return the config"),
    ],
)
def test_a_config_file_without_a_config(text, words, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(text)
    assert main(["retrack_jax", f"--config={tmp_path}/mine.py"]) == 2
    assert words in error_line(capsys)


def test_a_config_of_the_package_by_its_name_from_any_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "digits_tshirt").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["retrack_jax", "--config=digits_tshirt:siss", "--config.mode=check"]) == 0
    # A file of the user's of that name wins.
    (tmp_path / "digits_class.py").write_text("1 / 0\n")
    assert main(["retrack_jax", "--config=digits_class.py", "--config.mode=check"]) == 2
    assert "ZeroDivisionError" in error_line(capsys)


def test_the_config_may_follow_a_space(tmp_path, capsys):
    assert main(["retrack_jax", "--config", "configs/digits_tshirt.py", "--config.mode=check", f"--workdir={tmp_path}"]) == 0


BASE = "from retrack_jax.config.base import base_config\n\ndef get_config(method):\n    config = base_config('mine')\n"


@pytest.mark.parametrize("override", [[], ["--config.mode=check"], ["--config.nothing=1"]])
@pytest.mark.parametrize(
    "text, line, words",
    [
        (BASE + "    config.unlearn.num_stepz.x = 3\n    return config\n", 5, "AttributeError"),
        (BASE + "    return {}['nothing']\n", 5, "KeyError: 'nothing'"),
        (BASE + "    config.seeds = int('two')\n    return config\n", 5, "ValueError: invalid literal"),
        ("import no_such_module\n", 1, "ModuleNotFoundError"),
        ("import beside_it\n", 2, "ZeroDivisionError"),
        ("import sys\n\ndef get_config(method):\n    sys.exit(3)\n", 4, "SystemExit"),
        ("def get_config(method):\n    return 1 +\n", 2, "SyntaxError"),
    ],
)
def test_an_error_in_the_config_file_names_its_line(text, line, words, override, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "beside_it.py").write_text("\n1 / 0\n")
    (tmp_path / "mine.py").write_text(text)
    assert main(["retrack_jax", f"--config={tmp_path}/mine.py:siss", *override]) == 2
    found = error_line(capsys)
    file = "beside_it.py" if "beside_it" in text else "mine.py"
    assert f"{file}, line {line}" in found and words in found and "Traceback" not in found


def test_a_mistyped_field_of_a_config_that_needs_its_method(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(BASE + "    return config\n")
    assert main(["retrack_jax", f"--config={tmp_path}/mine.py:siss", "--config.unlearn.learning_rte=1"]) == 2
    assert "config.unlearn.learning_rte; did you mean 'learning_rate'" in error_line(capsys)


def test_another_configs_run_is_refused_with_the_fields(done, capsys):
    assert command(done, unlearn__num_steps=5) == 2
    assert "config.unlearn.num_steps (4 there, 5 now)" in error_line(capsys)


def test_a_file_in_the_workdirs_place(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert command(tmp_path / "file") == 2
    assert "--workdir" in error_line(capsys)


@pytest.mark.parametrize("flag", ["--config={}", "--config=custom --config.checkpoint={}", f"{CONFIG} --workdir={{}}"])
def test_a_name_too_long_for_a_file_is_one_line(flag, capsys):
    assert main(["retrack_jax", *flag.format("a" * 5000).split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1 and "aaa" in error and len(error) < 1300


def test_a_workdir_at_an_address_of_an_unknown_kind(capsys):
    assert command("http://host/work") == 2
    assert "--workdir http://host/work is an address of an unknown kind" in error_line(capsys)


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed here")
def test_a_bucket_without_its_client_names_the_extra(capsys):
    assert command("gs://bucket/work") == 2
    assert '".[gcs]"' in error_line(capsys)


def test_a_rate_that_diverges_names_quantity_and_step(done, tmp_path, capsys):
    import shutil

    shutil.copytree(done / "pretrained", tmp_path / "pretrained")
    assert command(tmp_path, unlearn__learning_rate=1e30, unlearn__clip_norm=0.0, log_every=1) == 2
    assert "at step" in error_line(capsys)


def test_the_usage_names_every_config_that_is_shipped():
    names = [path.stem for path in Path(__file__).parents[2].glob("configs/[!_]*.py")]
    assert len(names) > 8 and all(re.search(rf"\b{name}\b", USAGE) for name in names)


def test_none_on_the_command_line_leaves_a_field_open_that_may_be(capsys):
    argv = ["retrack_jax", "--config=digits_label", "--config.data.null_label=None", "--config.unlearn.retrack.snr_cap=None"]
    config, _ = parse(argv)
    assert config.data.null_label is None and config.unlearn.retrack.snr_cap is None and config.data.copies_label == 7
    assert main([*argv[:2], "--config.data.copies=None"]) == 2
    assert "--config.data.copies=None" in error_line(capsys)


def test_help_is_quick_and_heavy_imports_wait():
    program = "import sys; from retrack_jax.main import main; code = main(['x', '--help']); print(code, 'jax' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip().endswith("0 False"), result.stderr
    assert "usage:" in result.stdout
