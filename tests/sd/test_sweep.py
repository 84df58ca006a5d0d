"""Stable Diffusion runs beside the first: a sweep that is stopped between two concepts, and every method by its recipe."""

import json
import math

import numpy as np
import pytest

from retrack_jax.run import run
from retrack_jax.train.loop import Preempted
from tests.sd.tiny import tiny_config

OTHERS = ("siss", "siss_no_is", "erasediff", "neggrad", "vanilla")


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


def test_every_other_method_runs_by_its_recipe(tmp_path):
    """`all` shares one experiment, so that sampling is compiled once; ReTrack's own run is tests/sd/test_run.py's."""
    config = quick_config(tmp_path, "all")
    summary = run(config, tmp_path / "work")
    assert set(summary["methods"]) == {"pretrained", "retrack", *OTHERS}
    samples = {}
    for method in OTHERS:
        folder = tmp_path / "work" / method / "seed0-red_circle"
        metrics = json.loads((folder / "metrics.json").read_text())
        recipe = metrics["config"]["unlearn"]
        assert metrics["steps"] == 2 and (folder / "report.html").is_file()
        assert recipe["siss_scale"] == (750.0 if method.startswith("siss") else 0.0)
        assert recipe["erasediff_eta"] == (1e-2 if method == "erasediff" else 1e-3)
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        losses = [value for row in rows for name, value in row.items() if "loss" in name]
        assert losses and all(math.isfinite(value) for value in losses)
        samples[method] = np.load(folder / "samples.npz")["modified_float"]
    samples["pretrained"] = np.load(tmp_path / "work" / "pretrained" / "red_circle" / "samples.npz")["modified_float"]
    names = list(samples)
    for i, one in enumerate(names):
        for other in names[:i]:
            assert np.abs(samples[one] - samples[other]).max() > 1e-4, f"{one} and {other} give the same pictures"
    assert (tmp_path / "work" / "report.html").is_file()
