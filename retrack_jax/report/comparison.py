"""The page of a workdir: every method side by side, `report.html`, with its main plot as `comparison.svg` for a README.

It reads `summary.json` and the first samples of each method's first run.
"""

from collections.abc import Mapping

import numpy as np
from etils import epath

from retrack_jax.files import read_json, write_text
from retrack_jax.report import grids
from retrack_jax.report.catalogue import METHODS, describe, method_label
from retrack_jax.report.charts import Point, close_up, relearning_chart, scatter
from retrack_jax.report.page import render, standalone_svg
from retrack_jax.report.strips import neighbor_strips
from retrack_jax.report.tables import (
    absent_reasons,
    comparison_cell,
    comparison_columns,
    heading,
    method_order,
    provenance_rows,
    seconds_text,
    several_targets,
    signed,
)

_COLUMNS = 16  # samples of a method in one row
_SMALL = {"width": 480, "height": 340}  # of the charts that stand two in a row
_REFERENCES = ("pretrained", "retrain")
_RELEARNING = {
    "relearning_steps": "Fine-tuned on the remaining images and one copy of each forgotten one",
    "relearning_steps_remain": "Fine-tuned on the remaining images alone",
}


def comparison_report(
    workdir,
    *,
    samples: Mapping | None = None,
    marked: Mapping | None = None,
    mark_name="forgotten image",
    forgotten=None,
    num_forgotten=None,
    neighbors=None,
    distances=None,
    title: str | None = None,
    summary: Mapping | None = None,
) -> epath.Path:
    """Writes `report.html` and `comparison.svg` in `workdir` and returns the page's path.

    Args:
      workdir: the folder of the runs.
      samples: method -> uint8 `[N, H, W, C]`, image i of every method from the same noise; pass `pretrained` too.
      marked: method -> bool `[N]`, which of its samples are the forgotten image.
      mark_name: what those are called, such as `T-shirt`.
      forgotten, num_forgotten, neighbors, distances: as in `run_report`.
      title: the heading; by default the folder's name.
      summary: the content of `summary.json`; None reads the file.

    Raises:
      UserError: `summary.json` is needed and is missing or broken, or an array does not fit the others.
    """
    workdir = epath.Path(workdir)
    summary = read_json(workdir / "summary.json") if summary is None else summary
    charts = scatter_points(summary)
    if charts:
        names, points = charts[0]
        write_text(workdir / "comparison.svg", standalone_svg(scatter(points, *names)))
    text = render(
        "comparison.html",
        title=title or f"Unlearning compared: {workdir.name}",
        lead=_lead(summary),
        results=_results(summary),
        absent=absent_reasons(summary),
        charts=_charts(charts),
        gaps=_gaps(summary),
        verdict=_verdict(summary),
        relearning=_relearning(summary),
        samples=_samples(samples or {}, marked or {}, mark_name),
        mark_name=mark_name,
        neighbors=neighbor_strips(forgotten, neighbors, distances, mark_name, num_forgotten),
        methods=[(method, *METHODS.get(method, (method, ""))) for method in method_order(summary["methods"])],
        runs=_runs(workdir, summary),
        provenance=provenance_rows(summary.get("provenance")),
    )
    write_text(workdir / "report.html", text)
    return workdir / "report.html"


def scatter_points(summary: Mapping, most: int = 4) -> list[tuple[tuple[str, str], list[Point]]]:
    """Returns up to `most` ((forgetting metric, quality metric), points), the leading pair first.

    A pair needs two methods that have both metrics. Metrics that measure neither forgetting nor quality are in no pair.
    """
    names = comparison_columns(summary)
    # A metric that is the same for most methods, such as a frequency of 0, does not tell them apart; it comes last.
    strength = sorted((name for name in names if describe(name).about == "forgetting"), key=lambda name: _tied(summary, name))
    quality = [name for name in names if describe(name).about == "quality"]
    pairs = [(x, y) for y in quality for x in strength if _same_prompt(x, y)]
    charts = []
    for x, y in sorted(pairs, key=lambda pair: strength.index(pair[0]) + quality.index(pair[1]))[:most]:
        points = []
        for method in method_order(summary["methods"]):
            entry = summary["methods"][method]
            a, b = (entry.get("metrics", {}).get(name) for name in (x, y))
            if a and b:
                points.append(Point(method=method, x=a["mean"], y=b["mean"], x_std=a.get("std"), y_std=b.get("std")))
        if len(points) > 1:
            charts.append(((x, y), points))
    return charts


def _tied(summary: Mapping, name: str) -> bool:
    """Whether most methods have the same value of a metric as another."""
    means = [e["metrics"][name]["mean"] for m, e in summary["methods"].items() if m != "pretrained" and name in e["metrics"]]
    return len(set(means)) <= len(means) / 2


def _same_prompt(x: str, y: str) -> bool:
    ends = [next((end for end in ("_original", "_modified") if name.endswith(end)), "") for name in (x, y)]
    return ends[0] == ends[1] or "" in ends


def _lead(summary) -> str:
    compared = [entry["runs"] for name, entry in summary["methods"].items() if name not in _REFERENCES]
    runs = compared or [entry["runs"] for entry in summary["methods"].values()]
    each = f"{runs[0]} run{'s' * (runs[0] != 1)} each" if len(set(runs)) == 1 else f"{min(runs)} to {max(runs)} runs each"
    methods = f"{len(compared)} method{'s' * (len(compared) != 1)} on the same model, {each}. " if compared else ""
    if several_targets(summary):
        targets = len(summary["targets"])
        means = f"{methods}Numbers are means over {targets} targets ± the standard deviation of the seeds of one target."
        whole = all(entry["targets"] == targets for entry in summary["methods"].values())
        return means + ("" if whole else " Not every method was run on all of them: compare those target by target.")
    return f"{methods}Numbers are mean ± standard deviation over runs."


def _row(method: str, cells) -> dict:
    kind = "strong" if method == "retrack" else "reference" if method in _REFERENCES else ""
    return {"kind": kind, "label": method_label(method), "cells": cells}


def _results(summary) -> dict:
    """The main table: seconds come early, so that a narrow screen does not cut them off."""
    names, methods = comparison_columns(summary), summary["methods"]
    timed, several = any(entry.get("unlearn_seconds") for entry in methods.values()), several_targets(summary)
    rows = []
    for method in method_order(methods):
        seconds = [seconds_text(methods[method].get("unlearn_seconds"))] * timed
        counts = [str(methods[method]["runs"]), *[str(methods[method].get("targets"))] * several]
        cells = [*counts, *seconds, *(comparison_cell(summary, method, name) for name in names)]
        rows.append(_row(method, cells))
    return {
        "heads": ["Method", "Runs", *["Targets"] * several, *["Seconds"] * timed, *map(heading, names)],
        "rows": rows,
        "metrics": [describe(name) for name in names],
        "single": any(one.get("std") is None for entry in methods.values() for one in entry.get("metrics", {}).values()),
    }


def _gaps(summary) -> dict | None:
    """For each target that was retrained: each method's mean difference to it, and whether that is within its own spread."""
    tables = []
    for target, entries in summary.get("targets", {}).items():
        gold = entries.get("retrain", {}).get("metrics", {})
        compared = {m: entries[m]["gap_to_retrain"] for m in method_order(entries) if m != "retrain"}
        names = [name for name in comparison_columns(summary) if any(name in gaps for gaps in compared.values())]
        rows = []
        for method, gaps in compared.items():
            cells = []
            for name in names:
                gap, std = gaps.get(name, {}).get("mean"), gold[name]["std"]
                inside = gap is not None and std is not None and abs(gap) <= std
                cells.append(None if gap is None else {"text": signed(describe(name), gap), "inside": inside})
            rows.append(_row(method, cells))
        if names:
            heads = ["Method", *(describe(name).label for name in names)]
            spread = any(gold[name]["std"] is not None for name in names)
            tables.append({"target": target, "heads": heads, "rows": rows, "spread": spread})
    titled = several_targets(summary)
    return {"tables": tables, "titled": titled, "spread": any(table["spread"] for table in tables)} if tables else None


def _verdict(summary) -> dict | None:
    """For how many runs the loss on the forgotten images is one that a retrained model would have."""
    judged = {method: summary["methods"][method].get("forgotten") for method in method_order(summary["methods"])}
    judged = {method: verdict for method, verdict in judged.items() if verdict}
    if not judged:
        return None
    # A method has the intervals of the targets that it was run on; those of one target are the same for all.
    intervals = {target: interval for verdict in judged.values() for target, interval in verdict["intervals"].items()}
    notes = {target: why for verdict in judged.values() for target, why in verdict.get("too_few", {}).items()}
    for target in [target for verdict in judged.values() for target in verdict.get("not_remembered", ())]:
        notes[target] = "the pretrained model lies in this interval already: by its loss there is nothing to forget"
    counts = {method_label(m): f"{verdict['inside']} of {verdict['runs']}" for m, verdict in judged.items() if verdict["runs"]}
    return {
        "intervals": "; ".join(f"{target}: {low:.1f} to {high:.1f}" for target, (low, high) in intervals.items()),
        "counts": ", ".join(f"{label} {count}" for label, count in counts.items()),
        "notes": [f"{target}: {why}" for target, why in notes.items()],
    }


def _relearning(summary) -> list[tuple[str, str]]:
    """Returns (title, chart) for each target and kind of fine-tuning; targets do not share one, as their thresholds differ."""
    charts = []
    for target, entries in summary.get("targets", {}).items():
        for name, title in _RELEARNING.items():
            curves = {m: entries[m]["relearning"][name] for m in method_order(entries) if name in entries[m]["relearning"]}
            title = f"{target}: {title}" if several_targets(summary) else title
            charts += [(title, relearning_chart(curves, title))] if curves else []
    return charts


def _charts(charts) -> dict | None:
    if not charts:
        return None
    (names, points), rest = charts[0], charts[1:]
    small = [("", scatter(other, *pair, **_SMALL)) for pair, other in rest]
    near = close_up(points)
    if len(near) < len(points):
        left_out = ", ".join(method_label(point.method) for point in points if point not in near)
        small.insert(0, (f"Close-up of the plot above, without {left_out}.", scatter(near, *names, **_SMALL)))
    shown = {point.method for _, points in charts for point in points}
    return {"main": scatter(points, *names), "small": small, **{method: method in shown for method in _REFERENCES}}


def _samples(samples: Mapping, marked: Mapping, mark_name: str) -> dict | None:
    """A row of samples per method from the same noise; below it, from the noise that gave the forgotten image before."""
    if not samples:
        return None
    count = min(len(images) for images in samples.values())
    photo = max(next(iter(samples.values())).shape[1:3]) > 64
    columns = min(count, _COLUMNS // 2 if photo else _COLUMNS)
    before = np.asarray(marked.get("pretrained", np.zeros(count, bool)))[:count]
    drawn = np.flatnonzero(before)[:columns]
    chosen = np.concatenate([np.arange(columns), drawn]).astype(int)
    pictures = []
    for method in method_order(samples):
        label, mask = method_label(method), None
        caption, alt = "", f"{label}: {len(chosen)} samples"
        if method in marked:
            mask = np.asarray(marked[method])[:count]
            caption = f"{int(mask.sum())} of {count:,} samples are the {mark_name}"
            alt += f", {int(mask[chosen].sum())} outlined"
            mask = mask[chosen]
        picture = grids.data_uri(grids.grid(samples[method][chosen], columns=columns, marked=mask, largest=128), photo=photo)
        pictures.append({"title": label, "source": picture, "alt": alt, "caption": caption, "marked": False, "pixels": not photo})
    return {"drawn": len(drawn) > 0, "pictures": pictures}


def _runs(workdir, summary) -> list[tuple[str, list[tuple[str, str]]]]:
    """(method, [(run, address of its page), ...]); addresses are relative, so that a copied workdir keeps them."""
    pages = []
    for method in method_order(summary["methods"]):
        folder = workdir / method
        runs = sorted(run.name for run in folder.iterdir() if (run / "report.html").exists()) if folder.is_dir() else []
        if runs:
            pages.append((method_label(method), [(run, f"{method}/{run}/report.html") for run in runs]))
    return pages
