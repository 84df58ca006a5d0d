"""A sweep over concepts that is stopped between two of them."""

import json

import pytest

from retrack_jax.api import run
from retrack_jax.train.loop import Preempted
from tests.tiny_sd import tiny_config


def quick_config(tmp_path, method):
    config = tiny_config(tmp_path, method)
    with config.unlocked():
        config.eval.metrics = ("success_rate_original",)
        config.export = "none"
    return config


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_sweep_stopped_after_its_first_concept_goes_on_with_the_second(tmp_path):
    config = quick_config(tmp_path, "retrack")
    with config.unlocked():
        config.targets = ("red_circle", "blue_square")
    work = tmp_path / "work"
    first, second = (work / "retrack" / f"seed0-{name}" for name in config.targets)
    with pytest.raises(Preempted):
        run(config, work, should_stop=(first / "report.html").exists)
    assert not (second / "metrics.json").exists() and not (work / "summary.json").exists()

    before = files_of(first) | files_of(work / "pretrained" / "red_circle")
    summary = run(config, work)
    assert files_of(first) | files_of(work / "pretrained" / "red_circle") == before
    assert summary["methods"]["retrack"]["runs"] == 2
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (first, second)]
    assert [one["target"] for one in metrics] == list(config.targets) and [one["steps"] for one in metrics] == [2, 2]
    digests = {one["provenance"]["data"]["digest"] for one in metrics}
    assert len(digests) == 2  # each run forgot pictures of its own
