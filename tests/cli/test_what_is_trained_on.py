"""Which images each training run is given: recorded at the door of the input pipeline, by the command as a user types it."""

import numpy as np
import pytest

from retrack_jax.data.batches import Batches
from retrack_jax.data.sources.digits import digits_tshirt
from retrack_jax.main import main
from retrack_jax.run import training as stages
from tests.tiny import flags

GROUP = ("digit_0003", "digit_0007", "digit_0011")
IMAGES = digits_tshirt(8)
FORGET = np.array([IMAGES.ids.index(name) for name in GROUP])
REMAIN = np.setdiff1d(np.arange(len(IMAGES)), FORGET)


def recorded(monkeypatch, workdir, method, **more) -> list[dict]:
    """The fields of every input pipeline that a command makes."""
    made = []
    monkeypatch.setattr(stages, "Batches", lambda **fields: made.append(fields) or Batches(**fields))
    few = {"eval.metrics": ("frequency",), "sampling.num_images": 4, "sampling.batch_size": 4}
    arguments = flags(workdir, targets="+".join(GROUP), **few, **more)
    assert main(["retrack_jax", f"--config=configs/digits_tshirt.py:{method}", *arguments]) == 0
    return made


def pixels_of(fields: dict) -> np.ndarray:
    return fields["gather"](np.arange(fields["num_remain"]))["pixels"]


@pytest.mark.parametrize("method", ["retrack", "siss"])
def test_unlearning_keeps_what_remains_and_forgets_all_of_a_group(method, monkeypatch, tmp_path):
    pretrain, first, second = recorded(monkeypatch, tmp_path, method, seeds=(4, 5))
    np.testing.assert_array_equal(pixels_of(pretrain), IMAGES.images)
    assert (first["seed"], second["seed"]) == (4, 5)
    for fields in (first, second):
        np.testing.assert_array_equal(pixels_of(fields), IMAGES.images[REMAIN])
        assert sorted(fields["forget_rows"]) == [0, 1, 2]
        batches = Batches(**fields)
        visited = {int(row) for step in range(8) for row in np.ravel(batches(step)["forget_row"])}
        assert visited == {0, 1, 2}


def test_retraining_never_sees_the_forgotten_images(monkeypatch, tmp_path):
    made = recorded(monkeypatch, tmp_path, "retrain")
    assert [fields["num_remain"] for fields in made] == [len(IMAGES), len(REMAIN)]
    np.testing.assert_array_equal(pixels_of(made[1]), IMAGES.images[REMAIN])
    assert "forget_rows" not in made[1]
