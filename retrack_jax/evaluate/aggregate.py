"""Runs to summary.json: mean, standard deviation and number of runs of every metric, method by method and target by target."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict

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

        {"methods": {METHOD: {"runs", "targets", "metrics", "gap_to_retrain", "forgotten", "unlearn_seconds"}},
         "targets": {TARGET: {METHOD: {"metrics", "gap_to_retrain", "relearning"}}},
         "absent", "provenance"}

    `metrics` and `gap_to_retrain` are `{NAME: {"mean", "std", "runs"}}`. The mean is that of the targets' means, so targets
    count alike. The standard deviation is that of the seeds of one target, pooled over the targets: the sum of squares about
    each target's mean, divided by the sum of n - 1. It is None if no target has two seeds. A gap is to the mean of the
    target's retrained models. `censored` beside a mean of relearning steps counts the curves that ended before the loss was
    back; `num_samples` is the least number of samples behind a metric.
    `forgotten` is `{"inside", "runs", "intervals": {TARGET: [low, high]}, "too_few": {TARGET: why}, "not_remembered": [TARGET]}`:
    for how many runs the loss on the forgotten images lies in the interval of one more retrained model, with 95% confidence.
    Runs on the targets of `too_few` are not counted: fewer than `FEWEST_RETRAINED` models were retrained. Those of
    `not_remembered` are: the pretrained model lies in the interval already, so staying inside says little and leaving it much.
    It is None if fewer than two models were retrained.
    `relearning` holds the mean curves: `{NAME: {"steps", "values", "threshold"}}`. `provenance` is what all runs have in common.
    """
    intervals = _retrained_intervals(runs)
    runs = [*_pretrained(runs), *(run for run in runs if run["method"] != PRETRAINED)]
    retrained = [run for run in runs if run["method"] == "retrain"]
    methods, targets = {}, {run["target"]: {} for run in runs}
    for method in (PRETRAINED, *METHODS):
        mine = [run for run in runs if run["method"] == method]
        if not mine:
            continue
        judged = method not in (PRETRAINED, "retrain")
        methods[method] = {
            "runs": len(mine),
            "targets": len({run["target"] for run in mine}),
            **_compared(mine, retrained),
            "forgotten": _verdict(mine, intervals) if judged else None,
            "unlearn_seconds": _statistics([(run["target"], run["unlearn_seconds"]) for run in mine if "unlearn_seconds" in run]),
        }
        for target, entries in targets.items():
            here = [run for run in mine if run["target"] == target]
            if here:
                entries[method] = {**_compared(here, retrained), "relearning": _curves(here)}
    return {
        "methods": methods,
        "targets": targets,
        "absent": _absent(runs),
        "provenance": _common([run["provenance"] for run in runs]),
    }


def _pretrained(runs: Sequence[Mapping]) -> list[dict]:
    """Returns the pretrained model as one run for each target.

    Every run holds its metrics as they were when that run was evaluated: of two values the one from more samples counts.
    """
    found: dict[str, dict] = {}
    for run in sorted(runs, key=lambda run: run["provenance"].get("num_samples", 0)):
        one = found.setdefault(run["target"], {"method": PRETRAINED, "target": run["target"], "unlearned": {}})
        one["unlearned"] |= run["pretrained"]
        about = run["provenance"]
        absent = {"absent": about["absent"]} if run["method"] == PRETRAINED and "absent" in about else {}
        shared = {name: value for name, value in about.items() if name not in ("metrics", "absent")}
        one["provenance"] = {**shared, **absent, "metrics": _notes_before(about)}
    return list(found.values())


def _notes_before(provenance: Mapping) -> dict:
    """Returns how many samples are behind the pretrained model's metrics, of a run's provenance."""
    notes = {**provenance.get("metrics", {}), **provenance.get(PRETRAINED, {})}
    return {name: {"num_samples": note["num_samples"]} for name, note in notes.items() if "num_samples" in note}


def _compared(runs: Sequence[Mapping], retrained: Sequence[Mapping]) -> dict:
    """Returns `metrics` and `gap_to_retrain` of the runs of one method."""
    metrics = _spread([(run["target"], run["unlearned"]) for run in runs])
    for name, found in metrics.items():
        notes = [_note(run, name) for run in runs if name in run["unlearned"]]
        censored = sum(_censored(run, name) for run in runs)
        samples = [note["num_samples"] for note in notes if "num_samples" in note]
        found |= {"censored": censored} if censored else {}
        found |= {"num_samples": min(samples)} if samples else {}
    return {"metrics": metrics, "gap_to_retrain": _spread(list(_gaps(runs, retrained)))}


def _gaps(runs: Sequence[Mapping], retrained: Sequence[Mapping]) -> Iterable[tuple[str, dict]]:
    """Yields (target, metric -> its value less the mean of the retrained models'); relearning curves that ended have none."""
    for run in runs:
        golds = [gold for gold in retrained if gold["target"] == run["target"]]
        if run["method"] == "retrain" or not golds:
            continue
        gaps = {}
        for name, value in run["unlearned"].items():
            others = [gold["unlearned"][name] for gold in golds if name in gold["unlearned"]]
            if others and not any(_censored(one, name) for one in (*runs, *golds)):
                gaps[name] = value - statistics.fmean(others)
        yield run["target"], gaps


def _note(run: Mapping, name: str) -> dict:
    """Returns what a metric of a run was computed from."""
    note = run["provenance"].get("metrics", {}).get(name, {})
    samples = run["provenance"].get("num_samples")
    return {"num_samples": samples, **note} if name == "frequency" and samples else note


def _censored(run: Mapping, name: str) -> bool:
    """Whether the relearning curve behind a metric ended before the loss was back."""
    return bool(name in run["unlearned"] and _note(run, name).get(name, {}).get("censored"))


def _absent(runs: Sequence[Mapping]) -> dict[str, str]:
    """Returns metric -> why runs have no value of it, and which runs if others have one."""
    measured = {name for run in runs if run["method"] != PRETRAINED for name in run["unlearned"]}
    absent: dict[str, str] = {}
    for run in runs:
        for name, why in run["provenance"].get("absent", {}).items():
            found = f"{run['method']}: {why}" if name in measured else why
            if found not in absent.get(name, ""):
                absent[name] = "; ".join(filter(None, (absent.get(name), found)))
    return absent


def _common(provenances: Sequence[Mapping]) -> dict:
    """Returns what all of `provenances` say alike; the metrics' own notes are those of a run, on its page."""
    own = ("metrics", "absent", "final", PRETRAINED, "retrained", "retrained_seed")
    if not provenances:
        return {}
    first, *others = [flatten_dict({name: value for name, value in one.items() if name not in own}) for one in provenances]
    return unflatten_dict({path: value for path, value in first.items() if all(one.get(path) == value for one in others)})


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
    mine = {run["target"]: intervals[run["target"]] for run in judged}
    too_few = {
        target: f"too few to tell: {interval.runs} retrained models, and it takes {FEWEST_RETRAINED}"
        for target, interval in mine.items()
        if interval.runs < FEWEST_RETRAINED
    }
    counted = [run for run in judged if run["target"] not in too_few]
    inside = [_inside(mine[run["target"]], run["unlearned"]) for run in counted]
    before = {run["target"]: run["pretrained"] for run in counted}
    return {
        "inside": sum(inside),
        "runs": len(inside),
        "intervals": {target: [interval.low, interval.high] for target, interval in mine.items()},
        "too_few": too_few,
        "not_remembered": [target for target, values in before.items() if _inside(mine[target], values)],
    }


def _inside(interval: Interval, values: Mapping) -> bool:
    return "forget_loss" in values and interval.low <= values["forget_loss"] <= interval.high


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


def _spread(values: Sequence[tuple[str, Mapping]]) -> dict:
    """Returns metric -> its statistics, of (target, metric -> number) pairs."""
    names = list(dict.fromkeys(name for _, one in values for name in one))
    return {name: _statistics([(target, one[name]) for target, one in values if name in one]) for name in names}


def _statistics(values: Sequence[tuple[str, float]]) -> dict | None:
    """Returns the mean of the targets' means and the standard deviation within a target, of (target, number) pairs."""
    groups: dict[str, list[float]] = {}
    for target, value in values:
        groups.setdefault(target, []).append(value)
    if not groups:
        return None
    free = len(values) - len(groups)
    within = sum((value - statistics.fmean(group)) ** 2 for group in groups.values() for value in group)
    return {
        "mean": statistics.fmean(statistics.fmean(group) for group in groups.values()),
        "std": math.sqrt(within / free) if free else None,
        "runs": len(values),
    }
