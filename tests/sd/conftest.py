"""The tiny pipeline, loaded once, and what diffusers and transformers give for it."""

import shutil

import numpy as np
import pytest

from retrack_jax.checkpoints.stable_diffusion import load_pipeline
from tests.sd.tiny import CONCEPTS, PIPELINE, RECORDED


@pytest.fixture(scope="session")
def pipeline():
    return load_pipeline(PIPELINE)


@pytest.fixture(scope="session")
def recorded():
    with np.load(RECORDED) as archive:
        return {name: archive[name] for name in archive.files}


@pytest.fixture
def concepts(tmp_path):
    """A copy of the concepts that a test may spoil."""
    folder = tmp_path / "concepts"
    shutil.copytree(CONCEPTS, folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    """A copy of the pipeline that a test may spoil."""
    copy = tmp_path / "pipeline"
    shutil.copytree(PIPELINE, copy)
    return copy
