"""A metric that has no value here: absent with its reason beside the others, and tried again only where that could bring it."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrack_jax.data.dataset import image_set, pixels_to_model
from retrack_jax.diffusion.conversions import make_eps_fn
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.evaluate.finetune import SEED
from retrack_jax.evaluate.images import EVALUATORS, other_samples
from retrack_jax.evaluate.networks import feature_network
from retrack_jax.evaluate.results import (
    Evaluator,
    Inapplicable,
    Unavailable,
    evaluate,
    is_complete,
    read_results,
    worth_another_try,
)
from retrack_jax.evaluate.task import Subject
from retrack_jax.metrics.features.network import FeatureNetwork
from tests import toys


def task(rng, schedule, **more):
    images = toys.images(4)
    x_0 = pixels_to_model(images)
    known = dict(condition=None, held_out_condition=None, decode=None, clean=lambda: x_0[:2], held_out=lambda: x_0[2:])
    known |= dict(forgotten=images[:2], threshold=0.0, nll_probes=1, rng=rng, protocol_rng=rng, schedule=schedule)
    return SimpleNamespace(**known, eps_fn=make_eps_fn(toys.ToyNet().apply, schedule), **more)


def found(task, wanted, tmp_path, params=None):
    subject = Subject(toys.params() if params is None else params, toys.images(4, seed=1))
    return evaluate(EVALUATORS, wanted, task, subject, tmp_path / "evaluation.json")


def embed(images):
    return {"features": images.reshape(len(images), -1).astype(np.float64)}


embed.description, embed.digest = "pixels", "0" * 64


def test_a_short_schedule_leaves_out_what_goes_beyond_it(rng, tmp_path):
    schedule = Schedule.from_config({"num_train_timesteps": 110})
    wanted = ("nll_bits_per_dim", "forget_loss", "sscd", "sscd_norm", "membership_auc", "membership_auc_secmi")
    results = found(task(rng, schedule, sscd=lambda: embed), wanted, tmp_path)
    assert set(results.values) == {"forget_loss", "membership_auc"}
    assert "over 1000 steps; this model has another" in results.absent["nll_bits_per_dim"]
    assert "noised to t = 250, and this model's schedule ends at 109" in results.absent["sscd"]
    assert results.absent["sscd_norm"] == results.absent["sscd"]
    assert "t = 110, and this model's schedule ends at 109" in results.absent["membership_auc_secmi"]
    assert results.final == list(results.absent) and is_complete(EVALUATORS, wanted, None, tmp_path / "evaluation.json")


@pytest.mark.parametrize(("num_timesteps", "name"), [(251, "sscd"), (111, "membership_auc_secmi")])
def test_a_schedule_just_long_enough_has_the_metric(rng, tmp_path, num_timesteps, name):
    schedule = Schedule.from_config({"num_train_timesteps": num_timesteps})
    assert name in found(task(rng, schedule, sscd=lambda: embed), (name,), tmp_path).values


def test_a_cosine_schedule_leaves_the_likelihood_out(rng, tmp_path):
    schedule = Schedule.from_config({"beta_schedule": "squaredcos_cap_v2"})
    results = found(task(rng, schedule), ("nll_bits_per_dim", "forget_loss"), tmp_path)
    assert "the linear schedule" in results.absent["nll_bits_per_dim"] and set(results.values) == {"forget_loss"}


def test_a_diverged_model_lacks_its_metrics_and_no_other_does(rng, tmp_path):
    """A network that overflows has no loss; the frequency of its samples is known all the same, and nothing is tried again."""
    huge = jax.tree.map(lambda leaf: leaf * 1e30, toys.params())
    wanted = ("forget_loss", "frequency", "membership_auc")
    of_images = task(rng, toys.schedule())
    of_images.threshold = 3.0
    results = found(of_images, wanted, tmp_path, huge)
    assert set(results.values) == {"frequency"}
    assert "the model has diverged" in results.absent["forget_loss"] and results.final == ["forget_loss", "membership_auc"]


def test_every_long_metric_shows_its_progress(rng, tmp_path, capsys):
    wanted = ("nll_bits_per_dim", "forget_loss", "sscd", "membership_auc", "membership_auc_secmi")
    found(task(rng, toys.schedule(), sscd=lambda: embed), wanted, tmp_path)
    shown = {line.split(":")[0] for line in capsys.readouterr().err.splitlines()}
    assert shown >= set(wanted)


def test_an_ode_without_solution_leaves_the_likelihood_out(rng, tmp_path):
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), toys.params())
    results = found(task(rng, toys.schedule()), ("nll_bits_per_dim",), tmp_path, broken)
    assert "has no solution" in results.absent["nll_bits_per_dim"] and results.values == {}


def test_without_a_threshold_there_is_no_frequency_not_one_of_0(rng, tmp_path):
    results = found(task(rng, toys.schedule()), ("frequency",), tmp_path)
    assert results.values == {} and "config.eval.frequency_threshold" in results.absent["frequency"]


@pytest.mark.parametrize(
    ("images", "labels"),
    [((4, 8, 8, 1), None), ((4, 8, 8, 1), [0, 1, 2, 26]), ((4, 9, 9, 1), [0, 1, 2, 3])],
    ids=["no labels", "letters", "another size"],
)
def test_the_digit_network_is_for_labelled_digits(tmp_path, images, labels):
    labels = None if labels is None else np.array(labels)
    others = image_set("photos", np.zeros(images, np.uint8), [f"{i}.png" for i in range(4)], labels)
    with pytest.raises(Inapplicable, match="config.eval.features is digits, .* those of photos are not such; set it to incep"):
        feature_network("digits", others, tmp_path, tmp_path, "tf1")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("label", "num_labels", "why"),
    [
        (7, 0, "the target has label 7, and net knows classes that are not the data's labels"),  # Inception's ImageNet
        (10, 10, "the target has label 10, and net knows the labels 0 to 9"),  # the T-shirt
        (None, 10, "not the whole of one label"),
        (9, 10, None),
    ],
)
def test_a_label_that_the_network_does_not_know_has_no_share(rng, tmp_path, label, num_labels, why):
    logits = jnp.eye(12)[jnp.array([9, 9, 9, 3])]
    how = dict(apply_fn=lambda params, x: {"logits": logits}, prepare=lambda images: images, pad=False, num_labels=num_labels)
    net = FeatureNetwork("net", "d" * 64, "none", {}, **how)
    for options in ({"features": lambda: net, "classifier": None}, {"classifier": lambda official: net}):
        folder = tmp_path / str(len(options))
        results = found(task(rng, toys.schedule(), label=label, **options), ("label_share",), folder)
        assert results.values == ({} if why else {"label_share": 0.75})
        assert why is None or why in results.absent["label_share"]


def test_a_final_reason_is_not_tried_again_and_a_missing_file_is(tmp_path):
    tried = []

    def evaluator(name, outcome):
        def compute(task, subject, missing):
            tried.append(name)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome, {"why": "it needs held-out images"}

        return Evaluator(names=(name,), compute=compute)

    path, wanted = tmp_path / "evaluation.json", ("fid", "kid", "membership_auc", "sscd")
    table = [
        evaluator("fid", {"fid": 1.0}),
        evaluator("kid", Inapplicable("of other images")),
        evaluator("membership_auc", {}),
        evaluator("sscd", Unavailable("no weights")),
    ]
    results = evaluate(table, wanted, None, None, path)
    assert results.absent == {"kid": "of other images", "membership_auc": "it needs held-out images", "sscd": "no weights"}
    assert results.final == ["kid", "membership_auc"] and read_results(path) == results
    assert not is_complete(table, wanted, None, path) and is_complete(table, wanted[:3], None, path)

    evaluate(table, wanted, None, None, path)
    assert tried == [*wanted, "sscd"]
    table[3] = evaluator("sscd", {"sscd": 0.5})
    assert evaluate(table, wanted, None, None, path).values == {"fid": 1.0, "sscd": 0.5}
    assert "sscd" not in read_results(path).absent and is_complete(table, wanted, None, path)

    # A file from before there were final reasons is read, and its absent metrics are tried once more.
    stored = json.loads(path.read_text())
    del stored["final"]
    path.write_text(json.dumps(stored))
    assert not is_complete(table, wanted, None, path)
    assert evaluate(table, wanted, None, None, path).final == ["kid", "membership_auc"]
    assert tried[-2:] == ["kid", "membership_auc"]


def test_a_run_is_worth_another_try_for_what_another_try_could_bring():
    metrics = {"unlearned": {"fid": 1.0}, "provenance": {"absent": {"kid": "no weights", "sscd": "short"}, "final": ["sscd"]}}
    assert not worth_another_try(metrics, ("fid", "sscd"))
    assert worth_another_try(metrics, ("fid", "kid"))
    assert worth_another_try(metrics, ("fid", "recall"))  # asked for since
    del metrics["provenance"]["final"]  # a file from before there were final reasons
    assert worth_another_try(metrics, ("fid", "sscd")) and not worth_another_try(metrics, ("fid",))


def test_quality_is_measured_without_samples_under_labels_of_forgotten_images(rng):
    """Nor are stored values current that were measured with them."""
    images = toys.images(6, seed=1)
    known = task(rng, Schedule.create(), of_forgotten=np.array([True, False, False]))
    others, left_out = other_samples(known, Subject({}, images))
    np.testing.assert_array_equal(others, [False, True, True, False, True, True])
    assert "2 under labels drawn from forgotten images" in left_out and "none: no threshold" in left_out
    features = next(evaluator for evaluator in EVALUATORS if "fid" in evaluator.names)
    assert features.is_current(known, {"left_out": left_out}) and not features.is_current(known, {"left_out": "0 samples"})
    known.of_forgotten, known.threshold = None, 1e-3
    known.forgotten = images[1:2]
    others, left_out = other_samples(known, Subject({}, images))
    assert np.flatnonzero(~others).tolist() == [1] and left_out == "1 samples that are the forgotten image"
    assert features.is_current(known, {"left_out": "0 samples"})


def test_a_curve_of_another_draw_is_drawn_again(tmp_path):
    """Earlier versions fine-tuned a run of seed 0 on the draws that it was trained with."""
    path, name = tmp_path / "evaluation.json", "relearning_steps"
    for note, complete in (({"threshold": 5.4}, False), ({"threshold": 5.4, "seed": SEED}, True)):
        path.write_text(json.dumps({"values": {name: 40.0}, "notes": {name: note}, "absent": {}, "final": []}))
        assert is_complete(EVALUATORS, [name], None, path) == complete
