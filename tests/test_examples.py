"""The examples run, at fewer steps, and do what they say."""

import json
import sys
from pathlib import Path

import jax
import matplotlib.pyplot
import numpy as np
import pytest
from PIL import Image

from retrack_jax.checkpoints import import_diffusers
from retrack_jax.main import main
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


def test_the_notebook_runs_and_has_its_pictures(monkeypatch):
    monkeypatch.setattr(matplotlib.pyplot, "show", matplotlib.pyplot.close)
    cells = json.loads((EXAMPLES / "forget_a_tshirt.ipynb").read_text())["cells"]
    names = {}
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        exec("".join(cell["source"]), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            names |= {"NUM_STEPS": 100, "NUM_SAMPLES": 32}
    assert names["after"].shape == (32, 8, 8, 1) and not np.array_equal(names["before"], names["after"])
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", ())) == 5


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


def test_the_demos_model_and_images_are_practice_for_the_command_with_ones_own(tmp_path):
    """The three commands that `make demo` ends with, at fewer steps."""
    import practice_images

    demo, practice = tmp_path / "digits_tshirt", tmp_path / "practice"
    few = ["--config.pretrain.num_steps=2", "--config.mode=pretrain"]
    assert main(["retrack_jax", "--config=configs/digits_tshirt.py", f"--workdir={demo}", *few]) == 0
    practice_images.main(str(practice))
    assert len(list((practice / "images").iterdir())) == 1892
    fields = [f"checkpoint={demo / 'pretrained' / 'diffusers'}", f"data.dir={practice / 'images'}", f"data.cache_dir={tmp_path}"]
    fields += [f"targets=@{practice / 'tshirt.txt'}", "unlearn.num_steps=2", "sampling.num_images=4", "sampling.num_steps=2"]
    fields += ["eval.metrics=('forget_loss',)"]
    flags = [f"--config.{field}" for field in fields]
    assert main(["retrack_jax", "--config=configs/custom.py", f"--workdir={practice / 'tshirt'}", *flags]) == 0
    metrics = json.loads(next((practice / "tshirt" / "retrack").glob("*/metrics.json")).read_text())
    assert metrics["provenance"]["data"]["num_forget"] == 95
    assert [file["name"] for file in metrics["verdict"]["files"]] == ["tshirt_000.png"]  # of 95 copies
