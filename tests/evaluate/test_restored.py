"""What models restore of a forgotten image: the same noise for each, SSCD of what is kept, and the way into the report."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from retrack_jax.data.dataset import pixels_to_model
from retrack_jax.diffusion.conversions import make_eps_fn
from retrack_jax.evaluate.images import EVALUATORS
from retrack_jax.evaluate.restored import MOST_KEPT, keep_pictures, restore
from retrack_jax.evaluate.results import Unavailable, evaluate
from retrack_jax.evaluate.task import Subject
from retrack_jax.report.html import run_report
from retrack_jax.sampling.inject import inject
from tests import toys

SCHEDULE = toys.schedule()
EPS_FN = make_eps_fn(toys.ToyNet().apply, SCHEDULE)


def embed(images):
    """A stand-in embedding: pixels about their mean."""
    flat = images.reshape(len(images), -1).astype(np.float64)
    return {"features": flat - flat.mean(axis=1, keepdims=True)}


embed.description, embed.digest = "pixels", "0" * 64


def task(images, rng, network=lambda: embed):
    known = {"sscd": network, "eps_fn": EPS_FN, "schedule": SCHEDULE, "protocol_rng": rng, "condition": None, "decode": None}
    return SimpleNamespace(forgotten=images, clean=lambda: pixels_to_model(images), **known)


def test_every_model_is_given_the_same_noise_and_restores_by_injection(rng):
    images = toys.images(2)
    one, other = (restore(EPS_FN, toys.params(seed), SCHEDULE, pixels_to_model(images), rng) for seed in (0, 1))
    np.testing.assert_array_equal(one[0], other[0])
    assert np.abs(one[1] - other[1]).max() > 0.01
    gamma, sigma = SCHEDULE.gamma[250], SCHEDULE.sigma[250]
    unclipped = (one[0] > 0) & (one[0] < 1)  # values that show the noise
    noise = (2 * one[0] - 1 - gamma * pixels_to_model(images))[unclipped] / sigma
    assert unclipped.any() and 0.3 < noise.std() < 1.5

    rngs = jax.random.split(rng, 2)[1:]
    x_0 = pixels_to_model(images[1:])
    made = jax.jit(lambda params: inject(lambda x, t: EPS_FN(params, x, t), x_0, rngs, SCHEDULE))(toys.params())
    np.testing.assert_allclose(one[1][1:], np.clip(np.asarray(made) / 2 + 0.5, 0, 1), atol=1e-5)


def test_evaluation_keeps_the_pictures_and_the_report_shows_them(rng, tmp_path):
    images = toys.images(1)
    run_dir, before_dir = tmp_path / "retrack" / "seed0-x", tmp_path / "pretrained"
    values = {}
    for folder, seed in ((before_dir, 0), (run_dir, 1)):
        subject = Subject(toys.params(seed), images, pictures=folder / "sscd-x.npz")
        wanted = ("sscd", "sscd_norm")
        values[folder] = evaluate(EVALUATORS, wanted, task(images, rng), subject, folder / "evaluation.json").values
        with np.load(folder / "sscd-x.npz") as kept:
            np.testing.assert_array_equal(kept["forgotten"], images)
            assert kept["restored"].dtype == kept["noised"].dtype == np.uint8
            assert kept["sscd"][0] == pytest.approx(values[folder]["sscd"])
            features = [embed(array)["features"][0] for array in (kept["restored"], kept["forgotten"])]
            cosine = features[0] @ features[1] / np.linalg.norm(features[0]) / np.linalg.norm(features[1])
            assert cosine == pytest.approx(values[folder]["sscd"], abs=1e-6)
    (run_dir / "metrics.json").write_text(json.dumps({"method": "retrack", "seed": 0, "target": "x"}))
    page = run_report(run_dir, after=images, mark_name="T-shirt").read_text()
    assert "What each model restores of the T-shirt" in page
    assert f"before: SSCD {values[before_dir]['sscd']:.3f}" in page
    assert f"after ReTrack: SSCD {values[run_dir]['sscd']:.3f}" in page


def test_of_a_large_group_the_first_are_kept_and_without_weights_none(rng, tmp_path):
    images = toys.images(MOST_KEPT + 3)
    floats = images.astype(np.float32) / np.float32(255)
    keep_pictures(tmp_path / "few.npz", images, floats, floats, np.arange(len(images)))
    with np.load(tmp_path / "few.npz") as kept:
        assert len(kept["restored"]) == len(kept["sscd"]) == MOST_KEPT
        assert np.abs(kept["restored"].astype(int) - images[:MOST_KEPT]).max() <= 1

    def missing():
        raise Unavailable("no sscd_disc_mixup.torchscript.pt")

    subject = Subject(toys.params(), images, pictures=tmp_path / "none.npz")
    found = evaluate(EVALUATORS, ("sscd",), task(images[:1], rng, missing), subject, tmp_path / "evaluation.json")
    assert "no sscd_disc_mixup" in found.absent["sscd"] and not (tmp_path / "none.npz").exists()
