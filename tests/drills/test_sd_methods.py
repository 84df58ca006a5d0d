"""Stable Diffusion with every other method by its recipe: five programs to compile, too long for `make test`."""

import json
import math

import jax
import numpy as np
import pytest

from retrack_jax.run import run
from tests.sd.test_sweep import quick_config

OTHERS = ("siss", "siss_no_is", "erasediff", "neggrad", "vanilla")


@pytest.fixture
def hasty_compiler():
    """Six methods are six programs, each run twice: most of the time would go into optimizing them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_every_other_method_runs_by_its_recipe(tmp_path, hasty_compiler):
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
