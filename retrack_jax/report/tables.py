"""The tables of a run and of a comparison, as plain rows and as text; the page and the terminal print the same cells."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from flax.traverse_util import flatten_dict

from retrack_jax.metrics.frequency import frequency_upper_bound
from retrack_jax.report.catalogue import METHODS, Metric, describe, method_label, order
from retrack_jax.report.verdict import in_words

_FREQUENCIES = ("frequency", "label_frequency")
_PARTS = ("pretrained", "unlearned", "retrained")  # the models of a run's metrics.json


@dataclass(frozen=True, kw_only=True)
class Row:
    """One metric of a run: values as text, None where that model has none."""

    name: str
    before: str | None
    after: str | None
    retrained: str | None
    gap: str | None  # after minus retrained
    verdict: str  # "better", "worse" or "": after against before, by the metric's direction


def before_after_rows(metrics: Mapping) -> list[Row]:
    """Returns a row per metric of a run's `metrics.json`.

    A change is called better or worse if it is more than chance: a frequency's by Fisher's exact test at 5%, another metric's
    if it exceeds `Metric.noise` and the spread in its note. A metric of forgetting other than a frequency is called better only
    if the verdict calls the images forgotten.
    """
    parts = [metrics.get(part) or {} for part in _PARTS]
    forgotten = (metrics.get("verdict") or {"forgotten": "forgotten"})["forgotten"] == "forgotten"
    rows = []
    for name in order([name for part in parts for name in part]):
        metric = describe(name)
        before, after, gold = (part.get(name) for part in parts)
        notes = [_note(metrics, part, name) for part in _PARTS]
        verdict = ""
        if metric.better and _numbers(before, after) and _is_more_than_chance(metric, before, after, notes[1]):
            verdict = "better" if (after < before) == (metric.better == "lower") else "worse"
            if verdict == "better" and metric.about == "forgetting" and name not in _FREQUENCIES and not forgotten:
                verdict = ""
        gap = None
        if _numbers(after, gold) and not any(note["censored"] for note in notes[1:]):
            gap = signed(metric, after - gold)
        texts = [
            None if value is None else cell(name, value, **note) for value, note in zip((before, after, gold), notes, strict=True)
        ]
        rows.append(Row(name=name, before=texts[0], after=texts[1], retrained=texts[2], gap=gap, verdict=verdict))
    return rows


def _note(metrics: Mapping, part: str, name: str) -> dict:
    """Returns `{"num_samples", "censored", "std"}` of a metric of one model, from a run's provenance."""
    provenance = metrics.get("provenance") or {}
    notes = provenance.get("metrics", {})
    if part != "unlearned":  # theirs where they differ; an earlier version kept none of the retrained model's
        notes = {**notes, **provenance[part]} if part in provenance else {} if part == "retrained" else notes
    note = notes.get(name, {})
    censored = isinstance(note.get(name), Mapping) and note[name].get("censored", False)
    return {
        "num_samples": note.get("num_samples", provenance.get("num_samples")),
        "censored": censored,
        "std": note.get(f"{name}_std", 0.0),
    }


def _is_more_than_chance(metric: Metric, before: float, after: float, note: Mapping) -> bool:
    if metric.name in _FREQUENCIES and note["num_samples"]:
        from scipy.stats import fisher_exact  # imported here, so that the package loads quickly

        hits = [round(share * note["num_samples"]) for share in (before, after)]
        return fisher_exact([hits, [note["num_samples"] - count for count in hits]]).pvalue < 0.05
    return abs(after - before) > max(metric.noise * max(abs(before), abs(after)), note["std"])


def label_rows(labels, *marks) -> list[tuple[str, str, list[str]]]:
    """Returns (label, number of samples under it, for each of `marks` how many of these it marks and their share) for each label.

    Args:
      labels: int `[N]` or None, under which samples were drawn.
      marks: bool `[N]` for each model; a model without marks leaves the table empty.
    """
    if labels is None or any(mark is None for mark in marks):
        return []
    rows = []
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        counts = [int(np.asarray(mark)[mine].sum()) for mark in marks]
        rows.append((str(label), f"{len(mine):,}", [f"{count:,} ({100 * count / len(mine):.1f}%)" for count in counts]))
    return rows


def cell(name: str, value, *, num_samples: int | None = None, censored: bool = False, **_) -> str:
    """Returns the metric as text; a frequency of 0 with its 95% bound, and `> n` for relearning steps that were too few.

    Args:
      num_samples: how many samples are behind a frequency.
    """
    if name in _FREQUENCIES and value == 0 and num_samples:
        percent = 100 * frequency_upper_bound(0, num_samples)
        digits = max(2, -math.floor(math.log10(percent)))
        return f"0 (< {math.ceil(percent * 10**digits) / 10**digits:.{digits}f}%)"
    return ">\u00a0" * censored + describe(name).text(value)  # one word, which no page breaks


def signed(metric: Metric, gap: float) -> str:
    """Returns a difference with its sign; one that rounds to zero has none."""
    text = metric.text(abs(gap)) if gap else "0"
    return text if not any(digit in "123456789" for digit in text) else f"{'+' if gap > 0 else '−'}{text}"


def before_after_text(metrics: Mapping) -> str:
    """Returns the before/after table that the command prints at its end; below it, what is not in it and the verdict in words."""
    rows = before_after_rows(metrics)
    columns = [("", [describe(row.name).label for row in rows])]
    after = f"after {method_label(metrics.get('method', 'unlearning'))}"
    for heading, field in (("before", "before"), (after, "after"), ("retrained", "retrained")):
        cells = [getattr(row, field) for row in rows]
        if any(cells):
            columns.append((heading, [cell or "–" for cell in cells]))
    verdict = metrics.get("verdict")
    missing = _absent_text(metrics.get("provenance"))
    return text_table(columns) + missing + (f"\n\nverdict: {in_words(verdict)}" if verdict else "")


def method_order(methods) -> list[str]:
    """Returns `methods`, the two references first, then in the order of the catalogue, then unknown ones."""
    return [m for m in METHODS if m in methods] + [m for m in methods if m not in METHODS]


def several_targets(summary: Mapping) -> bool:
    """Whether the runs behind a `summary.json` are of more than one target."""
    return len(summary.get("targets", ())) > 1


def comparison_columns(summary: Mapping) -> list[str]:
    """Returns the metrics that the comparison shows, all that any method has."""
    return order(name for entry in summary["methods"].values() for name in entry.get("metrics", {}))


def comparison_cell(summary: Mapping, method: str, name: str) -> str | None:
    """Returns `12.31 ± 0.20` of one method and metric, or None if it has none.

    A frequency of 0 in every run is written with the 95% bound that the samples of one run give, as on the page of a run, and
    relearning steps as `> 120` if a curve behind their mean ended before the loss was back.
    """
    value = summary["methods"][method].get("metrics", {}).get(name)
    if value is None:
        return None
    if value.get("censored") or (name in _FREQUENCIES and value["mean"] == 0):
        return cell(name, value["mean"], num_samples=value.get("num_samples"), censored=bool(value.get("censored")))
    return describe(name).spread(value["mean"], value.get("std"))


def comparison_text(summary: Mapping, *, markdown: bool = False) -> str:
    """Returns the comparison across methods, mean ± standard deviation of the seeds, for the terminal or for a README."""
    methods = method_order(summary["methods"])
    entries = [summary["methods"][method] for method in methods]
    columns = [("method", [method_label(method) for method in methods]), ("runs", [str(entry["runs"]) for entry in entries])]
    if several_targets(summary):
        columns.append(("targets", [str(entry["targets"]) for entry in entries]))
    for name in comparison_columns(summary):
        columns.append((heading(name), [comparison_cell(summary, method, name) or "–" for method in methods]))
    if any(entry.get("unlearn_seconds") for entry in entries):
        columns.append(("seconds", [seconds_text(entry.get("unlearn_seconds")) or "–" for entry in entries]))
    return text_table(columns, markdown=markdown) + ("" if markdown else _absent_text(summary))


def _absent_text(results: Mapping | None) -> str:
    return "".join(f"\nnot measured: {label}: {reason}" for label, reason in absent_reasons(results))


def seconds_text(value: Mapping | None) -> str | None:
    """Returns mean seconds as text, or None."""
    if not value:
        return None
    return f"{value['mean']:.1f}" if value["mean"] < 100 else f"{value['mean']:,.0f}"


def heading(name: str) -> str:
    """Returns a metric's label with ↓ if lower is better, ↑ if higher is."""
    return describe(name).label + {"lower": " ↓", "higher": " ↑"}.get(describe(name).better, "")


def absent_reasons(results: Mapping | None) -> list[tuple[str, str]]:
    """Returns (label, what it needs) of each metric that `results["absent"]` names."""
    return [(describe(name).label, reason) for name, reason in ((results or {}).get("absent") or {}).items()]


def provenance_rows(provenance: Mapping | None) -> list[tuple[str, str]]:
    """Returns (dotted name, text) of all in `provenance` that no other section shows."""
    shown = {name: value for name, value in (provenance or {}).items() if name not in ("absent", "final")}
    return [(name, _leaf(value)) for name, value in flatten_dict(shown, sep=".").items()]


def _leaf(value) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return "–" if value is None else str(value)


def text_table(columns: Sequence[tuple[str, Sequence[str]]], *, markdown: bool = False) -> str:
    """Returns columns of (heading, cells) as aligned text, the first column to the left and the rest to the right."""
    widths = [max(len(heading), *(len(cell) for cell in cells), 3) for heading, cells in columns]

    def line(cells):
        padded = [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |" if markdown else "  ".join(padded).rstrip()

    rule = ["-" * w if i == 0 else "-" * (w - 1) + (":" if markdown else "-") for i, w in enumerate(widths)]
    rows = zip(*(cells for _, cells in columns), strict=True)
    return "\n".join([line([heading for heading, _ in columns]), line(rule), *(line(row) for row in rows)])


def _numbers(*values) -> bool:
    return all(isinstance(value, (int, float)) for value in values)
