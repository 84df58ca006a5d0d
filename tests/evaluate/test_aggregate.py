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
    assert methods["retrack"]["forgotten"] == {
        "inside": 1,
        "runs": 2,
        "intervals": {"label:10": [low, high]},
        "too_few": {},
        "not_remembered": [],
    }
    assert methods["neggrad"]["forgotten"]["inside"] == 0
    assert methods["retrain"]["forgotten"] is None and methods["pretrained"]["runs"] == 1
    assert methods["retrack"]["gap_to_retrain"]["forget_loss"]["mean"] == pytest.approx((low + high + 0.2) / 2 - 42.0)


def test_too_few_retrained_models_decide_nothing():
    runs = [run("retrain", seed, 40.0 + seed, 40.0) for seed in range(4)] + [run("retrack", 0, 41.0, 40.0)]
    found = summarize(runs)["methods"]["retrack"]["forgotten"]
    assert (found["inside"], found["runs"]) == (0, 0)
    assert found["too_few"] == {"label:10": "too few to tell: 4 retrained models, and it takes 5"}


def test_a_run_that_leaves_the_interval_of_an_image_that_was_not_remembered_is_counted():
    runs = [run("retrain", seed, 1.0 + seed, 1.0) for seed in range(5)]
    runs += [run("retrack", 0, 2.5, 1.0), run("neggrad", 0, 90.0, 1.0)]  # the pretrained model's loss is 2
    for method, inside in (("retrack", 1), ("neggrad", 0)):
        found = summarize(runs)["methods"][method]["forgotten"]
        assert (found["inside"], found["runs"]) == (inside, 1)
        assert found["too_few"] == {} and found["not_remembered"] == ["label:10"]


def of_targets(method, losses, **more):
    """A run for each target: its losses by seed."""
    return [
        run(method, seed, loss) | {"target": target, **more} for target, mine in losses.items() for seed, loss in enumerate(mine)
    ]


def test_targets_count_alike_and_their_difference_is_no_spread():
    retrain = of_targets("retrain", {"a": (129.0, 131.0), "b": (6.0,)})
    found = summarize(retrain + of_targets("retrack", {"a": (60.0, 60.0), "b": (60.0,)}))
    methods, targets = found["methods"], found["targets"]
    # Two seeds of one target: the spread is theirs, (1^2 + 1^2) / 1, and not the 62 between targets.
    assert methods["retrain"]["metrics"]["forget_loss"] == {"mean": 68.0, "std": pytest.approx(2**0.5), "runs": 3}
    assert methods["retrain"]["targets"] == 2
    # Gaps are paired by target: -69 and -71 on one, 54 on the other.
    assert methods["retrack"]["gap_to_retrain"]["forget_loss"]["mean"] == -8.0
    assert {name: one["retrack"]["gap_to_retrain"]["forget_loss"]["mean"] for name, one in targets.items()} == {
        "a": -70.0,
        "b": 54.0,
    }
    assert methods["pretrained"]["metrics"]["forget_loss"] == {"mean": 2.0, "std": None, "runs": 2}
    assert targets["a"]["pretrained"]["gap_to_retrain"]["forget_loss"]["mean"] == -128.0


def test_a_target_that_was_not_retrained_has_no_gap():
    found = summarize(of_targets("retrain", {"a": (130.0,)}) + of_targets("retrack", {"a": (130.0,), "b": (6.0,)}))
    assert found["methods"]["retrack"]["gap_to_retrain"] == {"forget_loss": {"mean": 0.0, "std": None, "runs": 1}}
    assert found["targets"]["b"]["retrack"]["gap_to_retrain"] == {}


def test_the_pretrained_model_has_every_metric_that_any_run_has_of_it_and_that_of_more_samples():
    few, many = run("siss", 0, 40.0), run("retrack", 0, 40.0)
    few |= {"pretrained": {"fid": 30.0, "kid": 0.3}, "provenance": {"num_samples": 100}}
    many |= {"pretrained": {"fid": 20.0}, "provenance": {"num_samples": 2000}}
    for runs in ([few, many], [many, few]):
        metrics = summarize(runs)["methods"]["pretrained"]["metrics"]
        assert {name: one["mean"] for name, one in metrics.items()} == {"fid": 20.0, "kid": 0.3}


def test_curves_that_ended_before_the_loss_was_back_have_no_gap():
    def relearned(method, seed, steps, censored):
        note = {"relearning_steps": {"steps": [0, 160], "values": [30.0, 20.0], "censored": censored}, "threshold": 5.0}
        one = run(method, seed, 40.0)
        return one | {"unlearned": {"relearning_steps": steps}, "provenance": {"metrics": {"relearning_steps": note}}}

    runs = [relearned("retrain", 0, 160, True), relearned("retrack", 0, 160, True), relearned("siss", 0, 20, False)]
    found = summarize(runs)["methods"]
    assert found["retrack"]["metrics"]["relearning_steps"]["censored"] == 1
    assert "censored" not in found["siss"]["metrics"]["relearning_steps"]
    assert found["retrack"]["gap_to_retrain"] == found["siss"]["gap_to_retrain"] == {}
    runs = [relearned("retrain", 0, 100, False), relearned("siss", 0, 10, False), relearned("siss", 1, 160, True)]
    assert summarize(runs)["methods"]["siss"]["gap_to_retrain"] == {}


def test_a_gap_is_to_the_mean_of_the_retrained_models():
    runs = [run("retrain", seed, loss) for seed, loss in enumerate((30.0, 20.0, 20.0))]
    runs += [run("siss", seed, 22.0) for seed in (5, 6, 7)]
    found = summarize(runs)["methods"]["siss"]["gap_to_retrain"]["forget_loss"]
    assert found["mean"] == pytest.approx(22.0 - 70.0 / 3)
    assert summarize([])["methods"] == {}


def test_a_frequency_has_the_samples_behind_it_and_provenance_what_all_runs_share():
    runs = [run("retrack", seed, 40.0) for seed in range(2)]
    for one, count in zip(runs, (1000, 2000), strict=True):
        one["unlearned"] = {"frequency": 0.0, "label_frequency": 0.0}
        one["provenance"] = {"num_samples": count, "versions": {"jax": "1", "numpy": f"{count}"}}
        one["provenance"]["metrics"] = {"label_frequency": {"num_samples": count // 10}}
    found = summarize(runs)
    assert {name: one["num_samples"] for name, one in found["methods"]["retrack"]["metrics"].items()} == {
        "frequency": 1000,
        "label_frequency": 100,
    }
    assert found["provenance"] == {"versions": {"jax": "1"}}


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
    found = summarize(runs)["targets"]["label:10"]["retrack"]["relearning"]
    assert found == {"relearning_steps": {"steps": [0, 10], "values": [41.0, 9.0], "threshold": 6.0}}


def test_one_retrained_model_has_no_spread_to_be_inside_of():
    summary = summarize([run("retrain", 0, 40.0, 40.0), run("retrack", 0, 41.0, 40.0)])
    assert summary["methods"]["retrack"]["forgotten"] is None
