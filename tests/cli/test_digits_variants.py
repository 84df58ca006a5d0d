"""The digits' two other targets, a class and a random share, from the command line; metrics that are asked for later."""

import json

import numpy as np
import pytest

from retrack_jax.main import main
from tests.tiny import flags

FEW = {
    "data.copies": 0,
    "data.held_out": 0.01,
    "targets": "random:0.01",
    "eval.relearning.steps": (1, 2),
    "eval.relearning.batch_size": 8,
}


def metrics_of(workdir, config, run, **more):
    assert main(["retrack_jax", f"--config=configs/{config}.py", *flags(workdir, **more)]) == 0
    return json.loads((workdir / run / "metrics.json").read_text())


@pytest.fixture(scope="module")
def random_share(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("random")
    more = {**FEW, "eval.metrics": ("membership_auc", "membership_auc_secmi")}
    return workdir, metrics_of(workdir, "digits_random", "retrack/seed0-random_0.01", **more)


def test_membership_of_a_random_share(random_share):
    _, found = random_share
    data, note = found["provenance"]["data"], found["provenance"]["metrics"]["membership_auc"]
    # 1% of 1,797 are held out, and 1% of what is left are forgotten.
    assert (data["num_forget"], data["num_remain"], note["held_out"]) == (18, 1797 - 18 - 18, 18)
    for name in ("membership_auc", "membership_auc_secmi"):
        low, high = note[f"{name}_95"]
        assert 0.0 <= low <= found["unlearned"][name] <= high <= 1.0
        assert found["pretrained"][name] != found["unlearned"][name]


def test_a_metric_may_be_asked_for_later(random_share):
    """The run is not made again: its parameters and samples stay; both relearning curves are added to what was there."""
    workdir, before = random_share
    folder = workdir / "retrack" / "seed0-random_0.01"
    stays = {path: path.stat().st_mtime_ns for path in (folder / "samples.npz", folder / "diffusers" / "config.json")}
    wanted = ("membership_auc", "relearning_steps", "relearning_steps_remain")
    after = metrics_of(workdir, "digits_random", folder.relative_to(workdir), **{**FEW, "eval.metrics": wanted})
    assert {path: path.stat().st_mtime_ns for path in stays} == stays
    assert before["unlearned"].items() <= after["unlearned"].items()
    for name in wanted[1:]:
        curve = after["provenance"]["metrics"][name][name]
        assert curve["steps"] == [0, 1, 2] and np.isfinite(curve["values"]).all()
        assert after["unlearned"][name] <= 2
    # At step 0 nothing is trained yet; then one sees the forgotten digits and the other does not.
    with_copy, alone = (after["provenance"]["metrics"][name][name]["values"] for name in wanted[1:])
    assert with_copy[0] == alone[0] and with_copy[1:] != alone[1:]


def test_a_class(tmp_path):
    more = {"data.copies": 0, "eval.metrics": ("label_share", "membership_auc")}
    found = metrics_of(tmp_path, "digits_class", "retrack/seed0-label_7", **more)
    assert found["provenance"]["data"]["num_forget"] == 179
    note = found["provenance"]["metrics"]["label_share"]
    assert note["label"] == 7 and 0.0 <= found["unlearned"]["label_share"] <= 1.0
    assert "random:SHARE" in found["provenance"]["absent"]["membership_auc"]


def test_a_metric_that_can_never_be_is_not_tried_again(tmp_path):
    """Without a threshold no sample is the forgotten image, and one digit is no whole class; the loss has a value."""
    more = {"data.copies": 0, "targets": "digit_0000", "eval.metrics": ("frequency", "label_share", "forget_loss")}
    place = "retrack/seed0-digit_0000"
    found = metrics_of(tmp_path, "digits_class", place, **more)
    assert set(found["unlearned"]) == {"forget_loss"} and set(found["provenance"]["final"]) == {"frequency", "label_share"}
    assert "config.eval.frequency_threshold" in found["provenance"]["absent"]["frequency"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / place).rglob("*") if path.is_file()}
    assert metrics_of(tmp_path, "digits_class", place, **more) == found
    assert {path: path.stat().st_mtime_ns for path in before} == before  # the same command again finds nothing to do
