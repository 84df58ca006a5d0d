"""summary.json: spreads, gaps to the retrained model, and the verdict."""

import pytest

from retrack_jax.evaluate.aggregate import summarize
from retrack_jax.metrics.membership import prediction_interval


def run(method, seed, loss, retrained=None):
    return {
        "method": method,
        "seed": seed,
        "target": "label:10",
        "unlearn_seconds": 1.0,
        "pretrained": {"forget_loss": 2.0},
        "unlearned": {"forget_loss": loss},
        "retrained": None if retrained is None else {"forget_loss": retrained},
        "provenance": {},
    }


def test_forgotten_is_inside_the_spread_of_retrained_seeds():
    losses = (40.0, 41.0, 42.0, 43.0, 44.0)
    runs = [run("retrain", seed, loss, loss) for seed, loss in enumerate(losses)]
    low, high = prediction_interval(losses)
    runs += [run("retrack", 0, low + 0.1, 40.0), run("retrack", 1, high + 0.1, 42.0), run("neggrad", 0, 2.0 * high, 40.0)]
    methods = summarize(runs)["methods"]
    assert methods["retrack"]["forgotten"] == {"inside": 1, "runs": 2, "intervals": {"label:10": [low, high]}, "too_few": {}}
    assert methods["neggrad"]["forgotten"]["inside"] == 0
    assert methods["retrain"]["forgotten"] is None and methods["pretrained"]["runs"] == 1
    assert methods["retrack"]["gap_to_retrain"]["forget_loss"]["mean"] == pytest.approx((low + high + 0.2) / 2 - 41.0)


@pytest.mark.parametrize(
    ("losses", "why"),
    [((40.0, 41.0, 42.0, 43.0), "4 retrained models, and it takes 5"), ((1.0, 2.0, 3.0, 4.0, 5.0), "holds the pretrained model")],
)
def test_too_few_retrained_models_decide_nothing(losses, why):
    runs = [run("retrain", seed, loss, loss) for seed, loss in enumerate(losses)] + [run("retrack", 0, losses[1], losses[1])]
    found = summarize(runs)["methods"]["retrack"]["forgotten"]
    assert (found["inside"], found["runs"]) == (0, 0)
    assert found["too_few"]["label:10"].startswith("too few to tell") and why in found["too_few"]["label:10"]


def test_a_metric_that_some_runs_have_is_absent_of_the_others_alone():
    runs = [run("retrack", 0, 40.0), run("neggrad", 0, 90.0), run("erasediff", 0, 90.0)]
    runs[2]["provenance"] = {"absent": {"relearning_steps": "it diverged"}}
    runs[0]["provenance"] = {"absent": {"fid": "no file of weights"}}
    runs[1]["provenance"] = {"absent": {"fid": "no file of weights", "relearning_steps": "it diverged"}}
    runs[0]["unlearned"]["relearning_steps"] = 10
    assert summarize(runs)["absent"] == {
        "fid": "no file of weights",
        "relearning_steps": "neggrad: it diverged; erasediff: it diverged",
    }


def test_relearning_curves_are_averaged_over_runs():
    runs = []
    for seed, shift in enumerate((0.0, 2.0)):
        runs.append(run("retrack", seed, 40.0))
        curve = {"steps": [0, 10], "values": [40.0 + shift, 8.0 + shift], "censored": True}
        runs[-1]["provenance"] = {"metrics": {"relearning_steps": {"threshold": 5.0 + shift, "relearning_steps": curve}}}
    found = summarize(runs)["methods"]["retrack"]["relearning"]
    assert found == {"relearning_steps": {"steps": [0, 10], "values": [41.0, 9.0], "threshold": 6.0}}


def test_one_retrained_model_has_no_spread_to_be_inside_of():
    summary = summarize([run("retrain", 0, 40.0, 40.0), run("retrack", 0, 41.0, 40.0)])
    assert summary["methods"]["retrack"]["forgotten"] is None
