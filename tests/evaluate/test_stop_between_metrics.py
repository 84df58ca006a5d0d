"""A stop that is asked for during evaluation comes between two metrics; the same command computes only the rest."""

import json

import pytest

from retrack_jax.checks import Preempted
from retrack_jax.evaluate.results import Evaluator, evaluate


def test_metrics_before_the_stop_are_kept_and_not_computed_again(tmp_path):
    computed = []

    def evaluator(name):
        def compute(task, subject, missing):
            computed.append(name)
            return {name: float(len(computed))}, {"how": name}

        return Evaluator(names=(name,), compute=compute)

    evaluators = [evaluator("fid"), evaluator("kid"), evaluator("sscd")]
    wanted, path = ("fid", "kid", "sscd"), tmp_path / "metrics.json"
    with pytest.raises(Preempted, match="stopped before the metric kid"):
        evaluate(evaluators, wanted, None, None, path, should_stop=lambda: bool(computed))
    assert json.loads(path.read_text())["values"] == {"fid": 1.0}
    results = evaluate(evaluators, wanted, None, None, path)
    assert computed == ["fid", "kid", "sscd"] and results.values == {"fid": 1.0, "kid": 2.0, "sscd": 3.0}
