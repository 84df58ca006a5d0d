"""`config.unlearn.calibrate`: what a run records, whose parameters it exports, and that it is an option of training."""

import json
import shutil

import jax
import numpy as np
import pytest

from retrack_jax.api import unlearn
from retrack_jax.checkpoints import import_diffusers
from retrack_jax.checks import UserError
from retrack_jax.cli.flags import parse
from retrack_jax.config.reading import read_config
from retrack_jax.config.recipes import UnlearnOptions
from retrack_jax.config.rules import complete
from retrack_jax.diffusion import Schedule
from retrack_jax.main import main
from retrack_jax.problem.judged import judged
from retrack_jax.problem.problem import build_problem
from tests.tiny import flags

RUN = "seed0-label_10"
FAST = {"unlearn.neggrad.learning_rate": 3e-3}  # so that four steps change the loss


def arguments(workdir, method, **more) -> list[str]:
    return ["retrack_jax", f"--config=configs/digits_tshirt.py:{method}", *flags(workdir, **FAST, **more)]


def command(workdir, method, **more) -> int:
    return main(arguments(workdir, method, **more))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A workdir with a run as training left it: gradient ascent, which raises the loss of any network."""
    workdir = tmp_path_factory.mktemp("plain")
    assert command(workdir, "neggrad", **{"eval.metrics": ("forget_loss",)}) == 0
    return workdir


def results(workdir) -> tuple[dict, dict]:
    """Returns a run's metrics.json and the parameters that it exported."""
    run = workdir / "neggrad" / RUN
    return json.loads((run / "metrics.json").read_text()), import_diffusers(run / "diffusers")[1]


def test_a_run_goes_to_where_the_loss_is_the_one_asked_for(plain, tmp_path, capsys):
    trained, end = results(plain)
    before, after = (trained[name]["forget_loss"] for name in ("pretrained", "unlearned"))
    reference = 0.5 * (before + after)
    shutil.copytree(plain / "pretrained", tmp_path / "pretrained")
    asked = {"unlearn.calibrate": f"{reference}", "eval.metrics": ("forget_loss",)}
    assert command(tmp_path, "neggrad", **asked) == 0
    (metrics, params), run = results(tmp_path), tmp_path / "neggrad" / RUN
    found = metrics["calibration"]
    assert 0 < found["alpha"] < 1 and found["reference"] == reference and len(found["curve"]) >= 3
    assert found["loss"] == pytest.approx(reference, rel=0.02)
    # Evaluation measures the same point, and the export is on the line there.
    assert metrics["unlearned"]["forget_loss"] == pytest.approx(found["loss"], rel=1e-4)
    for page in (run / "report.html", run / "diffusers" / "README.md"):
        assert f"Calibrated to {found['alpha']:.3g} of the way" in page.read_text()

    # The same command finds it finished, a missing stage is made from the same point, another reference is refused.
    kept = (run / "metrics.json").stat().st_mtime_ns
    assert command(tmp_path, "neggrad", **asked) == 0 and (run / "metrics.json").stat().st_mtime_ns == kept
    samples = (run / "samples.npz").read_bytes()
    for name in ("samples.npz", "metrics.json", "evaluation.json"):
        (run / name).unlink()
    assert command(tmp_path, "neggrad", **asked) == 0
    assert (run / "samples.npz").read_bytes() == samples and results(tmp_path)[0]["calibration"] == found
    capsys.readouterr()
    assert command(tmp_path, "neggrad", **{**asked, "unlearn.calibrate": "unseen"}) == 2
    assert "config.unlearn.calibrate" in capsys.readouterr().err

    # A reference that the pretrained model has already gives that model, which is the other end of the line.
    shutil.copytree(plain / "pretrained", tmp_path / "start" / "pretrained")
    assert command(tmp_path / "start", "neggrad", **{"unlearn.calibrate": "0.001"}) == 0
    ends, start = results(tmp_path / "start")
    assert ends["calibration"]["alpha"] == 0.0
    for leaf, a, b in zip(*map(jax.tree.leaves, (params, start, end)), strict=True):
        np.testing.assert_allclose(leaf, a + found["alpha"] * (b - a), rtol=1e-4, atol=1e-6)


def test_the_reference_may_be_what_unseen_images_have(plain, tmp_path):
    shutil.copytree(plain / "pretrained", tmp_path / "pretrained")
    assert command(tmp_path, "neggrad", **{"unlearn.calibrate": "unseen"}) == 0
    metrics, _ = results(tmp_path)
    assert f"{metrics['calibration']['reference']:.3g}" in metrics["verdict"]["why"]
    # The verdict's own draws: the model's loss is the one that it was calibrated to.
    assert metrics["verdict"]["files"][0]["after"] == pytest.approx(metrics["calibration"]["loss"], rel=1e-3)


def test_a_group_is_calibrated_to_the_mean_that_the_verdict_compares(tmp_path, plain):
    """The geometric mean over the images of which the verdict has an estimate; arithmetic means are larger."""
    shutil.copytree(plain / "pretrained", tmp_path / "pretrained")
    asked = {"unlearn.calibrate": "unseen", "targets": ("random:0.05",)}
    assert command(tmp_path, "neggrad", **asked) == 0
    metrics = json.loads(next(tmp_path.glob("neggrad/*/metrics.json")).read_text())
    config, _ = parse(arguments(tmp_path, "neggrad", **asked))
    problem = build_problem(complete(read_config(config)))
    chosen = judged(problem, problem.target("random:0.05"))
    usable = chosen.usable[: len(chosen.names)]
    after = np.array([file["after"] for file in metrics["verdict"]["files"]])
    assert 30 < usable.sum() < len(after)
    loss = metrics["calibration"]["loss"]
    assert loss == pytest.approx(np.exp(np.log(after[usable]).mean()), rel=2e-5)
    for other in (after[usable].mean(), np.exp(np.log(after).mean())):
        assert loss != pytest.approx(other, rel=5e-5)


def test_a_group_is_calibrated_to_a_number_as_the_metric_measures_it(tmp_path, plain):
    shutil.copytree(plain / "pretrained", tmp_path / "pretrained")
    asked = {"unlearn.calibrate": "90", "targets": ("random:0.05",), "eval.metrics": ("forget_loss",)}
    assert command(tmp_path, "neggrad", **asked) == 0
    metrics = json.loads(next(tmp_path.glob("neggrad/*/metrics.json")).read_text())
    assert 0 < metrics["calibration"]["alpha"] < 2
    # 16 draws of each of 95 images, against 256.
    assert metrics["unlearned"]["forget_loss"] == pytest.approx(90, rel=0.03)


def test_an_estimate_that_cannot_be_had_is_refused_before_training(plain, tmp_path, capsys):
    """Too few images are left to compare with: all but six images are forgotten."""
    shutil.copytree(plain / "pretrained", tmp_path / "pretrained")
    asked = {"unlearn.calibrate": "unseen", "targets": ("random:0.997",), "unlearn.num_neighbors": 3}
    assert command(tmp_path, "neggrad", **asked) == 2
    assert "cannot be estimated (only " in capsys.readouterr().err
    assert not list(tmp_path.glob("neggrad/*/checkpoints"))


@pytest.mark.parametrize("value", ["seen", "-1", "0", "nan", "inf"])
def test_a_mistyped_reference_is_refused(value):
    with pytest.raises(UserError, match="calibrate is"):
        UnlearnOptions(calibrate=value)


def test_arrays_alone_have_no_reference():
    images = np.zeros((4, 8, 8, 1), np.uint8)
    with pytest.raises(UserError, match="line_search"):
        unlearn(lambda *_: None, {"a": np.zeros(1)}, Schedule(), images, images[:1], rng=jax.random.key(0), calibrate="26.9")
