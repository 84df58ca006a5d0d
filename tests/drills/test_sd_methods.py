"""Stable Diffusion with every other method by its recipe: six programs to compile, too long for `make test`."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from retrack_jax.api import run
from retrack_jax.checkpoints import export_pipeline, load_pipeline
from retrack_jax.checkpoints.diffusers_import import FAMILIES
from tests.problem.test_sweep_of_concepts import quick_config
from tests.tiny_sd import PIPELINE, hasty_compiler

OTHERS = ("siss", "siss_no_is", "erasediff", "neggrad", "vanilla")
# EraseDiff's step is vanilla's wherever the two gradients agree: its weight is max(eta - <g_R, g_c>/|g_c|^2, 0), which is then 0.
# On this toy they do at both steps, and the pictures are equal. The combination itself is tested in tests/unlearn.
MAY_COINCIDE = {"erasediff", "vanilla"}


@pytest.fixture
def small_pipeline(tmp_path):
    """The tiny pipeline with a UNet of one block: methods do not differ in blocks, and programs compile in half the time."""
    pipeline = load_pipeline(PIPELINE)
    small = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",), "mid_block_type": None}
    unet = pipeline.unet.clone(block_out_channels=(16,), **small)
    params = jax.jit(unet.init)(jax.random.key(0), *FAMILIES["UNet2DConditionModel"].inputs(unet))["params"]
    export_pipeline(tmp_path / "pipeline", dataclasses.replace(pipeline, unet=unet), params)
    return tmp_path / "pipeline"


def test_every_other_method_runs_by_its_recipe(tmp_path, small_pipeline):
    """`all` shares one problem, so that sampling is compiled once; ReTrack's run is tests/problem/test_run_of_concepts.py's."""
    config = quick_config(tmp_path, "all")
    with config.unlocked():
        config.checkpoint = str(small_pipeline)
    with hasty_compiler():
        summary = run(config, tmp_path / "work")
    assert set(summary["methods"]) == {"pretrained", "retrack", *OTHERS}
    samples = {}
    for method in OTHERS:
        folder = tmp_path / "work" / method / "seed0-red_circle"
        metrics = json.loads((folder / "metrics.json").read_text())
        own = metrics["config"]["methods"][method]["own"]
        assert metrics["steps"] == 2 and (folder / "report.html").is_file()
        assert own.get("scale") == (750.0 if method.startswith("siss") else None)
        assert own.get("eta") == (1e-2 if method == "erasediff" else None)
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        losses = [value for row in rows for name, value in row.items() if "loss" in name]
        assert losses and all(math.isfinite(value) for value in losses)
        samples[method] = np.load(folder / "samples.npz")["modified_float"]
    samples["pretrained"] = np.load(tmp_path / "work" / "pretrained" / "red_circle" / "samples.npz")["modified_float"]
    names = list(samples)
    for i, one in enumerate(names):
        for other in names[:i]:
            if {one, other} != MAY_COINCIDE:
                assert np.abs(samples[one] - samples[other]).max() > 1e-4, f"{one} and {other} give the same pictures"
    assert (tmp_path / "work" / "report.html").is_file()
