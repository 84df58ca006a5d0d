"""Runs to summary.json: mean, standard deviation and number of runs of every metric, method by method."""

import statistics
from collections.abc import Mapping, Sequence

from retrack_jax.metrics.membership import prediction_interval
from retrack_jax.unlearn.methods import METHODS, PRETRAINED


def summarize(runs: Sequence[Mapping]) -> dict:
    """Returns the content of `summary.json` for the `metrics.json` dicts of all runs:

        {"methods": {METHOD: {"runs", "metrics", "gap_to_retrain", "forgotten", "relearning", "unlearn_seconds"}},
         "absent", "provenance"}

    `metrics` and `gap_to_retrain` are `{NAME: {"mean", "std", "runs"}}`. The standard deviation divides by n - 1, and is None for
    one run. The gap is to the retrained model of the same seed, or of the lowest seed that has one.
    `forgotten` is `{"inside", "runs", "intervals": {TARGET: [low, high]}}`: for how many runs the loss on the forgotten images
    lies in the interval of one more retrained model, with 95% confidence. It is None if fewer than two models were retrained.
    `relearning` holds the mean curves: `{NAME: {"steps", "values", "threshold"}}`.
    """
    intervals = _retrained_intervals(runs)
    methods: dict[str, dict] = {}
    # Every run holds the metrics of the pretrained model, which all seeds share: one entry per target is enough.
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
                "forgotten": None if method == "retrain" else _verdict(mine, intervals),
                "relearning": _curves(mine),
                "unlearn_seconds": _statistics([run["unlearn_seconds"] for run in mine]),
            }
    absent = {name: why for run in runs for name, why in run["provenance"].get("absent", {}).items()}
    return {"methods": methods, "absent": absent, "provenance": runs[0]["provenance"] if runs else {}}


def _retrained_intervals(runs: Sequence[Mapping]) -> dict[str, tuple[float, float]]:
    """Returns target -> the interval in which the loss on it of one more retrained model would lie."""
    losses: dict[str, list[float]] = {}
    for run in runs:
        if run["method"] == "retrain" and "forget_loss" in run["unlearned"]:
            losses.setdefault(run["target"], []).append(run["unlearned"]["forget_loss"])
    return {target: prediction_interval(values) for target, values in losses.items() if len(values) > 1}


def _verdict(runs: Sequence[Mapping], intervals: Mapping[str, tuple[float, float]]) -> dict | None:
    judged = [run for run in runs if run["target"] in intervals and "forget_loss" in run["unlearned"]]
    if not judged:
        return None
    bounds = {run["target"]: list(intervals[run["target"]]) for run in judged}
    inside = [low <= run["unlearned"]["forget_loss"] <= high for run in judged for low, high in [bounds[run["target"]]]]
    return {"inside": sum(inside), "runs": len(inside), "intervals": bounds}


def _curves(runs: Sequence[Mapping]) -> dict[str, dict]:
    """Returns the mean relearning curves of the runs of a method."""
    curves = {}
    for name in ("relearning_steps", "relearning_steps_remain"):
        notes = [run["provenance"].get("metrics", {}).get(name) for run in runs]
        notes = [note for note in notes if note]
        if notes:
            values = [statistics.fmean(column) for column in zip(*(note[name]["values"] for note in notes), strict=True)]
            curves[name] = {"steps": notes[0][name]["steps"], "values": values, "threshold": notes[0]["threshold"]}
    return curves


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
