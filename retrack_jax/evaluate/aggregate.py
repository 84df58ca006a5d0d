"""Runs to summary.json: mean, standard deviation and number of runs of every metric, method by method."""

import statistics
from collections.abc import Mapping, Sequence

from retrack_jax.unlearn.methods import METHODS, PRETRAINED


def summarize(runs: Sequence[Mapping]) -> dict:
    """Returns `summary.json` for the `metrics.json` dicts of all runs.

    `{"methods": {METHOD: {"runs", "metrics": {NAME: {"mean", "std", "runs"}}, "gap_to_retrain", "unlearn_seconds"}}, "absent", "provenance"}`.
    The standard deviation is the sample's (n - 1), None for one run. The gap is to the retrained model of the same run.
    """
    methods: dict[str, dict] = {}
    # Every run carries the pretrained model's metrics; one entry a target is enough, for seeds share it.
    pretrained = list({run["target"]: run["pretrained"] for run in runs}.values())
    methods[PRETRAINED] = {"runs": len(pretrained), "metrics": _spread(pretrained)}
    for method in METHODS:
        mine = [run for run in runs if run["method"] == method]
        if mine:
            gaps = [_gap(run["unlearned"], run["retrained"]) for run in mine if run["retrained"] and method != "retrain"]
            methods[method] = {
                "runs": len(mine),
                "metrics": _spread([run["unlearned"] for run in mine]),
                "gap_to_retrain": _spread(gaps),
                "unlearn_seconds": _statistics([run["unlearn_seconds"] for run in mine]),
            }
    absent = {name: why for run in runs for name, why in run["provenance"].get("absent", {}).items()}
    return {"methods": methods, "absent": absent, "provenance": runs[0]["provenance"] if runs else {}}


def _gap(values: Mapping, gold: Mapping) -> dict:
    return {name: value - gold[name] for name, value in values.items() if name in gold}


def _spread(values: Sequence[Mapping]) -> dict:
    names = list(dict.fromkeys(name for one in values for name in one))
    return {name: _statistics([one[name] for one in values if name in one]) for name in names}


def _statistics(values: Sequence[float]) -> dict:
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "runs": len(values),
    }
