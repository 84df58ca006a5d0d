"""The examples run, at fewer steps, and do what they say."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from retrack_jax.checkpoints import import_diffusers
from retrack_jax.unlearn.methods import METHODS
from tests.tiny_checkpoint import write_model

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def examples_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    METHODS.pop("relabel", None)
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_own_network_forgets_what_it_memorized():
    import own_network

    losses = own_network.main(num_steps=250)
    assert losses["memorized"] < 0.6 * losses["never saw it"]
    assert losses["after ReTrack"] > 1.5 * losses["memorized"]


def test_new_method_is_added_and_raises_the_loss():
    import new_method

    losses = new_method.main(num_steps=200)
    assert losses["after"] > losses["before"]


def test_forget_an_image_writes_a_folder_that_was_trained(tmp_path):
    import forget_an_image

    model, pictures, out = write_model(tmp_path / "model"), tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    for row, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (14, 8, 8, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(pictures / f"{row}.png")
    forget_an_image.main(str(model), str(pictures), str(out), "3.png", num_steps=2, batch_size=4)
    (_, before), (_, after) = import_diffusers(model), import_diffusers(out)
    assert any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))
    with pytest.raises(SystemExit, match="missing.png"):
        forget_an_image.main(str(model), str(pictures), str(out), "missing.png")
