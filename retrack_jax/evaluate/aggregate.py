"""Runs to summary.json: mean, standard deviation and number of runs of every metric, method by method."""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from retrack_jax.metrics.membership import prediction_interval
from retrack_jax.unlearn.methods import METHODS, PRETRAINED

# The spread of few models is itself hardly known: with 3, an interval is 5.0 standard deviations wide each way, with 5 it is 3.0.
FEWEST_RETRAINED = 5


class Interval(NamedTuple):
    """Where the loss of one more retrained model would lie, and of how many models this is known."""

    low: float
    high: float
    runs: int


def summarize(runs: Sequence[Mapping]) -> dict:
    """Returns the content of `summary.json` for the `metrics.json` dicts of all runs:

        {"methods": {METHOD: {"runs", "metrics", "gap_to_retrain", "forgotten", "relearning", "unlearn_seconds"}},
         "absent", "provenance"}

    `metrics` and `gap_to_retrain` are `{NAME: {"mean", "std", "runs"}}`. The standard deviation divides by n - 1, and is None for
    one run. The gap is to the retrained model of the same seed, or of the lowest seed that has one.
    `forgotten` is `{"inside", "runs", "intervals": {TARGET: [low, high]}, "too_few": {TARGET: why}}`: for how many runs the loss
    on the forgotten images lies in the interval of one more retrained model, with 95% confidence. Runs on the targets of
    `too_few` are not counted: fewer than `FEWEST_RETRAINED` models were retrained, or the interval holds the pretrained model
    too. It is None if fewer than two models were retrained.
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
    measured = {name for run in runs for name in run["unlearned"]}
    absent: dict[str, str] = {}
    for run in runs:
        for name, why in run["provenance"].get("absent", {}).items():
            found = f"{run['method']}: {why}" if name in measured else why  # others have a value
            if found not in absent.get(name, ""):
                absent[name] = "; ".join(filter(None, (absent.get(name), found)))
    return {"methods": methods, "absent": absent, "provenance": runs[0]["provenance"] if runs else {}}


def _retrained_intervals(runs: Sequence[Mapping]) -> dict[str, Interval]:
    """Returns target -> the interval in which the loss on it of one more retrained model would lie."""
    losses: dict[str, list[float]] = {}
    for run in runs:
        if run["method"] == "retrain" and "forget_loss" in run["unlearned"]:
            losses.setdefault(run["target"], []).append(run["unlearned"]["forget_loss"])
    return {target: Interval(*prediction_interval(values), len(values)) for target, values in losses.items() if len(values) > 1}


def _verdict(runs: Sequence[Mapping], intervals: Mapping[str, Interval]) -> dict | None:
    judged = [run for run in runs if run["target"] in intervals and "forget_loss" in run["unlearned"]]
    if not judged:
        return None
    bounds = {run["target"]: [intervals[run["target"]].low, intervals[run["target"]].high] for run in judged}
    too_few = {run["target"]: why for run in judged if (why := _undecided(run, intervals[run["target"]]))}
    inside = [
        low <= run["unlearned"]["forget_loss"] <= high
        for run in judged
        if run["target"] not in too_few
        for low, high in [bounds[run["target"]]]
    ]
    return {"inside": sum(inside), "runs": len(inside), "intervals": bounds, "too_few": too_few}


def _undecided(run: Mapping, interval: Interval) -> str:
    """Returns why an interval of retrained models does not decide what is forgotten; empty if it does."""
    if interval.runs < FEWEST_RETRAINED:
        return f"too few to tell: {interval.runs} retrained models, and it takes {FEWEST_RETRAINED}"
    before = run["pretrained"].get("forget_loss")
    if before is not None and interval.low <= before <= interval.high:
        return f"too few to tell: the interval of {interval.runs} retrained models holds the pretrained model too"
    return ""


def _curves(runs: Sequence[Mapping]) -> dict[str, dict]:
    """Returns the mean relearning curves of the runs of a method."""
    curves = {}
    for name in ("relearning_steps", "relearning_steps_remain"):
        notes = [run["provenance"].get("metrics", {}).get(name) for run in runs]
        notes = [note for note in notes if note]
        if notes:
            values = [statistics.fmean(column) for column in zip(*(note[name]["values"] for note in notes), strict=True)]
            threshold = statistics.fmean(note["threshold"] for note in notes)  # targets differ in theirs
            curves[name] = {"steps": notes[0][name]["steps"], "values": values, "threshold": threshold}
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
