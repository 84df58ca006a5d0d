"""The same command again, after what it read or what it asks for has changed."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from retrack_jax.main import main
from tests.tiny_checkpoint import write_model


def write_images(folder, seed):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("again")
    write_model(root / "model", seed=1)
    write_images(root / "images", seed=1)
    assert command(root, root / "run") == 0
    return root


def command(root, workdir, *more, method="retrack"):
    fields = ["unlearn.num_steps=2", "unlearn.batch_size=4", "unlearn.accumulation=1", "sampling.batch_size=4"]
    fields += ["sampling.num_images=4", "sampling.num_steps=2", "eval.metrics=('frequency','forget_loss')", "targets=3.png"]
    fields += ["eval.frequency_threshold=100.0", f"checkpoint={root / 'model'}", f"data.dir={root / 'images'}"]
    flags = [f"--config.{field}" for field in (*fields, f"data.cache_dir={root / 'cache'}", *more)]
    return main(["retrack_jax", f"--config=configs/custom.py:{method}", f"--workdir={workdir}", *flags])


@pytest.fixture
def again(finished, tmp_path):
    """Where the inputs are, and a copy of the finished run that a test may spoil."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return finished, tmp_path / "run"


def run_folder(workdir):
    return next((workdir / "retrack").glob("seed0-*"))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda root: write_model(root / "model", seed=9), "other weights in config.checkpoint than the config names now"),
        (lambda root: write_images(root / "images", seed=2), "other images than the config names now"),
        (
            lambda root: (root / "model" / "scheduler" / "scheduler_config.json").write_text('{"beta_end": 0.03}'),
            "other noise schedule in config.checkpoint than",
        ),
        (
            lambda root: write_model(root / "model", seed=1, norm_eps=1e-3),
            "other network's settings in config.checkpoint than",
        ),
    ],
)
def test_inputs_that_changed_under_the_same_paths_are_named(change, words, again, capsys):
    root, workdir = again
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    change(root)
    assert command(root, workdir) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and words in error[0] and "choose another --workdir" in error[0]
    assert before == {path: path.stat().st_mtime_ns for path in before}
    write_model(root / "model", seed=1)
    write_images(root / "images", seed=1)


def test_steps_per_call_change_no_result_beyond_rounding(again, tmp_path):
    """Both steps in one call give the same samples and numbers; a finished run takes the field without a word.

    Not to the bit here: the last digit of the unlearning loss of the first step differs.
    """
    root, workdir = again
    assert command(root, workdir, "compute.steps_per_call=2") == 0
    assert command(root, tmp_path / "two", "compute.steps_per_call=2") == 0
    one, two = run_folder(workdir), run_folder(tmp_path / "two")
    samples = [np.load(folder / "samples.npz")["samples"].astype(int) for folder in (one, two)]
    assert np.abs(samples[0] - samples[1]).max() <= 1
    metrics = [json.loads((folder / "metrics.json").read_text())["unlearned"] for folder in (one, two)]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-6)
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (one, two)]
    assert len(logs[0]) == len(logs[1]) == 2
    for records in zip(*logs, strict=True):
        assert {**records[0], "time": 0} == pytest.approx({**records[1], "time": 0}, rel=1e-6)


def test_more_samples_are_added_and_metrics_computed_again(again, capsys):
    root, workdir = again
    folder = run_folder(workdir)
    old = {place: np.load(place / "samples.npz")["samples"] for place in (folder, workdir / "pretrained")}
    losses = json.loads((folder / "metrics.json").read_text())["unlearned"]["forget_loss"]
    assert command(root, workdir, "sampling.num_images=11", "mode=eval") == 2
    assert "samples.npz holds [4] samples of 11; run --config.mode=sample first" in capsys.readouterr().err
    assert command(root, workdir, "sampling.num_images=11") == 0
    for place, samples in old.items():
        grown = np.load(place / "samples.npz")["samples"]
        assert len(grown) == 11
        np.testing.assert_array_equal(grown[:4], samples)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["provenance"]["num_samples"] == 11 and metrics["unlearned"]["forget_loss"] == losses
    assert metrics["provenance"]["metrics"]["frequency"]["num_samples"] == 11
    assert command(root, root / "fresh", "sampling.num_images=11") == 0
    fresh = run_folder(root / "fresh")
    one, other = (np.load(place / "samples.npz")["samples"].astype(int) for place in (folder, fresh))
    assert np.abs(one - other).max() <= 1  # batches of other sizes round differently
    before = (folder / "metrics.json").stat().st_mtime_ns
    assert command(root, workdir, "sampling.num_images=11") == 0
    assert (folder / "metrics.json").stat().st_mtime_ns == before


def test_guidance_is_refused_by_a_network_without_prompts(again, capsys):
    root, workdir = again
    for field in ("guidance_scale=2.0", "negative_prompt=blurry", "num_captions=3"):
        assert command(root, workdir, f"sampling.{field}") == 2
        assert f"config.sampling.{field.partition('=')[0]}: " in capsys.readouterr().err


def test_fewer_samples_are_refused(again, capsys):
    root, workdir = again
    assert command(root, workdir, "sampling.num_images=3") == 2
    assert "holds 4 samples and config.sampling.num_images is 3: none are thrown away" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[]", '{"values": {"frequency": "a"}, "format": 2, "model": 3}', "folder"])
@pytest.mark.parametrize("name", ["config.json", "metrics.json", "evaluation.json"])
def test_json_of_another_shape_is_one_line(name, content, again, capsys):
    root, workdir = again
    folder = run_folder(workdir)
    if name == "evaluation.json":
        (folder / "metrics.json").unlink()
    (folder / name).unlink()
    if content == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).write_text(content)
    assert command(root, workdir) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and str(folder / name) in error[0]


def test_a_metric_that_is_no_number_is_named(again, capsys):
    root, workdir = again
    path = run_folder(workdir) / "metrics.json"
    metrics = json.loads(path.read_text())
    path.write_text(json.dumps(metrics | {"unlearned": {"frequency": None}}))
    assert command(root, workdir) == 2
    assert "unlearned.frequency is 'None'; delete it" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[]", '{"methods": 3}', ""])
def test_a_summary_of_another_shape_is_written_again(content, again):
    root, workdir = again
    whole = (workdir / "summary.json").read_text()
    (workdir / "summary.json").write_text(content)
    assert command(root, workdir) == 0
    assert (workdir / "summary.json").read_text() == whole


def test_a_folder_in_place_of_the_summary_is_one_line(again, capsys):
    root, workdir = again
    (workdir / "summary.json").unlink()
    (workdir / "summary.json").mkdir()
    assert command(root, workdir) == 2
    assert f"error: cannot write {workdir / 'summary.json'}" in capsys.readouterr().err


def test_another_workdir_takes_the_pretrained_models_samples_from_the_cache(tmp_path, capfd, caplog):
    """Other samples are put into the cache, so that it shows which workdirs read it."""
    write_model(tmp_path / "model", seed=1)
    write_images(tmp_path / "images", seed=1)

    def samples_of(name, *more):
        assert command(tmp_path, tmp_path / name, *more, method="pretrained") == 0
        return np.load(tmp_path / name / "pretrained" / "samples.npz")["samples"]

    drawn = samples_of("first")
    (kept,) = (tmp_path / "cache" / "samples").glob("*.npz")
    np.testing.assert_array_equal(np.load(kept)["samples"], drawn)
    np.savez(kept, samples=255 - drawn)
    np.testing.assert_array_equal(samples_of("same"), 255 - drawn)
    assert f"samples of the pretrained model are read from {kept}" in capfd.readouterr().err
    assert not np.array_equal(samples_of("seed", "sampling.seed=1"), 255 - drawn)
    np.testing.assert_array_equal(samples_of("same", "sampling.num_images=8")[:4], 255 - drawn)
    np.testing.assert_array_equal(samples_of("more", "sampling.num_images=8")[:4], drawn)  # "same" adds none to the cache
    kept.write_bytes(b"damaged")
    np.testing.assert_array_equal(samples_of("damaged"), drawn)
    shutil.rmtree(kept.parent)
    kept.parent.write_text("in the way")
    write_model(tmp_path / "model", seed=9)
    assert not np.array_equal(samples_of("weights"), drawn)
    assert "another workdir will draw these samples again: cannot write" in caplog.text
