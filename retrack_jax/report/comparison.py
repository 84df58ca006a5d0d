"""The page of a workdir: every method side by side, `report.html`, with its main plot as `comparison.svg` for a README.

It reads `summary.json` and the first samples of each method's first run.
"""

from collections.abc import Mapping

import numpy as np
from etils import epath

from retrack_jax.files import read_json, write_text
from retrack_jax.report import grids
from retrack_jax.report.catalogue import METHODS, describe, method_label
from retrack_jax.report.charts import Point, close_up, scatter
from retrack_jax.report.html import absent_list, dash, provenance_table
from retrack_jax.report.page import escape, figure, page, section, standalone_svg
from retrack_jax.report.relearning import relearning_section
from retrack_jax.report.strips import neighbor_strips
from retrack_jax.report.tables import arrow, comparison_cell, comparison_columns, method_order, seconds_text, signed

_COLUMNS = 16  # samples of a method in one row
_SMALL = {"width": 500, "height": 340}  # of the charts that stand two in a row
_REFERENCES = ("pretrained", "retrain")


def comparison_report(
    workdir,
    *,
    samples: Mapping | None = None,
    marked: Mapping | None = None,
    mark_name="forgotten image",
    forgotten=None,
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
      forgotten, neighbors, distances: as in `run_report`.
      title: the heading; by default the folder's name.
      summary: what `summary.json` holds, or is to hold; None: it is read.

    Raises:
      UserError: `summary.json` is wanted and missing or broken, or an array does not fit the others.
    """
    workdir = epath.Path(workdir)
    summary = read_json(workdir / "summary.json") if summary is None else summary
    title = title or f"Unlearning compared: {workdir.name}"
    charts = scatter_points(summary)
    if charts:
        (x_name, y_name), points = charts[0]
        write_text(workdir / "comparison.svg", standalone_svg(scatter(points, x_name, y_name)))

    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{_lead(summary)}</p>',
        section("Results", _table(summary), _table_note(summary), absent_list(summary.get("absent"))),
        section("Unlearning strength against quality", _charts(charts)),
        section("Distance to the retrained model", _gap_table(summary), _verdict(summary)),
        section("Relearning", relearning_section(summary)),
        section("Samples of every method, from the same noise", _samples(samples or {}, marked or {}, mark_name)),
        section(f"The {mark_name} and its neighbors", neighbor_strips(forgotten, neighbors, distances, mark_name)),
        section("The methods", _methods(summary)),
        section("Single runs", _runs(workdir, summary)),
        section("Provenance", provenance_table(summary.get("provenance"))),
    ]
    write_text(workdir / "report.html", page(f"{title} · retrack_jax", "\n".join(filter(None, body))))
    return workdir / "report.html"


def scatter_points(summary: Mapping, most: int = 4) -> list[tuple[tuple[str, str], list[Point]]]:
    """Returns up to `most` ((forgetting metric, quality metric), points), the leading pair first.

    A pair needs two methods that have both metrics. Metrics whose direction is unknown are in no pair.
    """
    names = comparison_columns(summary)
    # A frequency that is 0 for nearly every method tells none from another; it goes last.
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
                runs = a.get("runs", entry["runs"])
                points.append(Point(method=method, x=a["mean"], y=b["mean"], x_std=a.get("std"), y_std=b.get("std"), runs=runs))
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
    methods = summary["methods"]
    runs = [entry["runs"] for name, entry in methods.items() if name not in _REFERENCES] or [
        entry["runs"] for entry in methods.values()
    ]
    each = f"{runs[0]} run{'s' * (runs[0] != 1)} each" if len(set(runs)) == 1 else f"{min(runs)} to {max(runs)} runs each"
    return f"{len(methods)} methods on the same model, {each}. Numbers are mean ± standard deviation over runs."


def _table(summary) -> str:
    names = comparison_columns(summary)
    seconds = any(entry.get("unlearn_seconds") for entry in summary["methods"].values())
    heads = ["Method", "Runs", *(f"{describe(name).label} {arrow(name)}".strip() for name in names)] + ["Seconds"] * seconds
    rows = []
    for method in method_order(summary["methods"]):
        entry = summary["methods"][method]
        cells = [str(entry["runs"]), *(comparison_cell(entry, name) for name in names)]
        cells += [seconds_text(entry.get("unlearn_seconds"))] if seconds else []
        rows.append(_row(method, cells))
    return _html_table(heads, rows)


def _table_note(summary) -> str:
    directions = "↓ lower is better, ↑ higher is better. "
    meanings = "".join(
        f"<li><strong>{escape(describe(name).label)}</strong>: {escape(describe(name).meaning)}</li>"
        for name in comparison_columns(summary)
        if describe(name).meaning
    )
    single = any(e.get("std") is None for entry in summary["methods"].values() for e in entry.get("metrics", {}).values())
    note = "A row without ± comes from a single run." if single else ""
    return f'<p class="soft">{directions}{note}</p><details><summary>What the numbers mean</summary><ul>{meanings}</ul></details>'


def _gap_table(summary) -> str:
    """Each method's mean minus the retrained model's; shaded words say where that is inside the spread of retrain seeds."""
    gold = summary["methods"].get("retrain", {}).get("metrics", {})
    names = [name for name in comparison_columns(summary) if name in gold]
    rows = []
    for method in method_order(summary["methods"]):
        if method == "retrain" or not names:
            continue
        cells = []
        for name in names:
            value = summary["methods"][method].get("metrics", {}).get(name)
            cells.append(
                None if value is None else _gap(describe(name), value["mean"] - gold[name]["mean"], gold[name].get("std"))
            )
        rows.append(_row(method, cells))
    if not rows:
        return ""
    spread = any(gold[name].get("std") is not None for name in names)
    note = (
        ' <span class="better">✓</span> marks a gap within one standard deviation of the retrained models\' own runs.'
        if spread
        else ""
    )
    return (
        f"<p>Mean minus the mean of <em>retrain</em>, the model that never saw the data: 0 is the goal.{note}</p>"
        + _html_table(["Method", *(describe(name).label for name in names)], rows)
    )


def _verdict(summary) -> str:
    """For how many runs the loss on the forgotten images is one that a retrained model would have."""
    judged = {m: summary["methods"][m].get("forgotten") for m in method_order(summary["methods"])}
    judged = {method: found for method, found in judged.items() if found}
    if not judged:
        return ""
    # A method has the intervals of the targets that it was run on; those of one target are the same for all.
    intervals = {target: interval for found in judged.values() for target, interval in found["intervals"].items()}
    shown = "; ".join(f"{escape(target)}: {low:.1f} to {high:.1f}" for target, (low, high) in intervals.items())
    counts = ", ".join(f"{method_label(m)} {found['inside']} of {found['runs']}" for m, found in judged.items())
    return (
        "<p><strong>Forgotten</strong> by the loss: under the same noises, the loss on the forgotten images lies where "
        f"that of one more retrained model would, with 95% confidence ({shown}). Runs for which it does: {counts}.</p>"
    )


def _gap(metric, gap: float, std: float | None) -> str:
    inside = std is not None and abs(gap) <= std
    return signed(metric, gap) + (' <span class="better" title="within the spread of retrain">✓</span>' if inside else "")


def _row(method: str, cells) -> str:
    kind = {"retrack": ' class="strong"', "pretrained": ' class="reference"', "retrain": ' class="reference"'}.get(method, "")
    values = "".join(f"<td>{cell or dash()}</td>" for cell in cells)
    return f'<tr{kind}><th scope="row">{escape(method_label(method))}</th>{values}</tr>'


def _html_table(heads, rows) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _charts(charts) -> str:
    if not charts:
        return ""
    (names, points), rest = charts[0], charts[1:]
    small = [("", scatter(other, *pair, **_SMALL)) for pair, other in rest]
    near = close_up(points)
    if len(near) < len(points):
        left_out = ", ".join(method_label(point.method) for point in points if point not in near)
        small.insert(0, (f"Close-up of the plot above, without {left_out}.", scatter(near, *names, **_SMALL)))
    note = (
        "<p>Bars are one standard deviation over runs. Star and dashed lines mark <em>retrain</em>: the nearer to it, the "
        "closer to never having seen the data. The hollow circle is the model before unlearning.</p>"
    )
    more = "".join(f"<figure>{chart}<figcaption>{caption}</figcaption></figure>" for caption, chart in small)
    return f'{note}<figure>{scatter(points, *names)}</figure><div class="pair">{more}</div>'


def _samples(samples: Mapping, marked: Mapping, mark_name: str) -> str:
    """A row of samples per method from the same noise; below it, from the noise that gave the forgotten image before."""
    if not samples:
        return ""
    count = min(len(images) for images in samples.values())
    small = max(next(iter(samples.values())).shape[1:3]) <= 64
    columns = _COLUMNS if small else _COLUMNS // 2
    before = np.asarray(marked.get("pretrained", np.zeros(count, bool)))[:count]
    drawn = np.flatnonzero(before)[:columns]
    chosen = np.concatenate([np.arange(min(columns, count)), drawn]).astype(int)
    note = "Column <em>j</em> of every method starts from the same noise."
    if len(drawn):
        note += f" The second row is the noise from which the pretrained model drew the {escape(mark_name)}"
        note += ', outlined <span class="key"></span> wherever it is drawn.'
    figures = []
    for method in method_order(samples):
        mask = np.asarray(marked[method])[:count] if method in marked else None
        picture = grids.grid(samples[method][chosen], columns=columns, marked=None if mask is None else mask[chosen], largest=128)
        caption = "" if mask is None else f"{int(mask.sum())} of {count:,} samples are the {escape(mark_name)}"
        alt = f"{method_label(method)}: {len(chosen)} samples" + ("" if mask is None else f", {int(mask[chosen].sum())} outlined")
        figures.append(
            figure(grids.data_uri(picture, photo=not small), alt, title=method_label(method), caption=caption, pixels=small)
        )
    return f'<p>{note}</p><div class="rows">{"".join(figures)}</div>'


def _methods(summary) -> str:
    lines = (
        f"<li><strong>{escape(METHODS[m][0])}</strong>: {escape(METHODS[m][1])}</li>"
        for m in method_order(summary["methods"])
        if m in METHODS
    )
    return f"<ul>{''.join(lines)}</ul>"


def _runs(workdir, summary) -> str:
    """Links to the reports of single runs, relative, so that a copied workdir keeps them."""
    items = []
    for method in method_order(summary["methods"]):
        folder = workdir / method
        runs = sorted(run.name for run in folder.iterdir() if (run / "report.html").exists()) if folder.is_dir() else []
        if runs:
            links = ", ".join(f'<a href="{escape(method)}/{escape(run)}/report.html">{escape(run)}</a>' for run in runs)
            items.append(f"<li><strong>{escape(method_label(method))}</strong>: {links}</li>")
    return f"<ul>{''.join(items)}</ul>" if items else ""
