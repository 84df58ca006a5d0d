"""Charts as SVG text: what a run logged, unlearning strength against quality, and how soon a method relearns.

Matplotlib draws them in placeholder colors, which `_svg` replaces by the CSS variables of the page: a chart follows the light or
dark theme. Coordinates are CSS pixels at the size at which the chart is drawn. The same numbers give the same bytes.
"""

import contextlib
import html
import io
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from retrack_jax.checks import figures
from retrack_jax.report.catalogue import METHODS, Metric, describe, method_label

_VARIABLES = ("paper", "line", "ink", "soft", "accent", *(f"m-{method}" for method in METHODS))
_RESERVED = ("step", "time")
_STYLE = {
    "svg.hashsalt": "retrack_jax",
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],  # comes with matplotlib; the page shows its own, narrower font
    "text.parse_math": False,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.linewidth": 1.0,
    "ytick.major.size": 0,
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
    "axes.labelsize": 13,
}


def _color(name: str) -> str:
    """Returns the placeholder of the CSS variable `--NAME`."""
    return f"#0000{1 + _VARIABLES.index(name if name in _VARIABLES else 'soft'):02x}"


def _of_method(method: str) -> str:
    return _color(f"m-{method}")


@contextlib.contextmanager
def _style():
    import matplotlib.style  # imported here, so that the package loads quickly

    colors = dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _color("soft"))
    # Matplotlib's defaults first: a matplotlibrc of the user must not change a report.
    with matplotlib.style.context("default"), matplotlib.rc_context(_STYLE | colors | {"grid.color": _color("line")}):
        yield


def _axes(width: int, height: int, *, left: int, right: int, top: int, bottom: int, x_label: str):
    """Returns the axes of a new figure of `width` x `height` pixels with these margins."""
    from matplotlib.figure import Figure

    size = (1 - (left + right) / width, 1 - (top + bottom) / height)
    axes = Figure((width / 72, height / 72), dpi=72, facecolor="none").add_axes((left / width, bottom / height, *size))
    axes.set(xlabel=x_label, facecolor="none")
    return axes


def _scale(axis, values, *, log: bool = False, percent: bool = False, steps: bool = False, ticks: int = 5) -> None:
    """Sets limits that hold all `values` with some room (`steps`: whole numbers, without room), and round ticks, on an axis."""
    from matplotlib import ticker

    low, high = min(values), max(values)
    if log:
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        room = 1.05 * (high / low) ** 0.08
        limits = low / room, high * room
        axis.set_major_locator(ticker.LogLocator(subs=(1,) if high / low > 300 else (1, 2, 5), numticks=ticks + 3))
        axis.set_minor_locator(ticker.NullLocator())
    else:
        if percent:  # a share: at least one percent wide, and inside [0, 1]
            low, high = max(low, 0.0), min(max(high, low + 0.01), 1.0)
            low = min(low, high - 0.01)
        elif high - low <= 1e-9 * max(abs(low), abs(high)):
            spread = 0.1 * abs(high) or 1.0
            low, high = low - spread, high + spread
        room = 0.0 if steps else 0.08 * (high - low)
        limits = low - room, high + room
        axis.set_major_locator(ticker.MaxNLocator(ticks, integer=steps))
    axis.set_major_formatter(lambda value, _: f"{round(100 * value, 6):g}%" if percent else number(value))
    axis.axes.set(**{f"{axis.axis_name}lim": limits})


def _svg(axes, title: str, description: str) -> str:
    """Returns the chart as an `<svg>` element with its name and its numbers for screen readers."""
    buffer = io.StringIO()
    axes.figure.savefig(buffer, format="svg", metadata={"Date": None})
    body = re.sub(r"<defs>\s*<style.*?</defs>", "", buffer.getvalue().split("</metadata>", 1)[1], flags=re.DOTALL)
    # Several charts share a page, and names may appear in it once: our own become classes, matplotlib's go.
    body = re.sub(r'<g id="(?:[\w.]+_\d+|([^"]+))"', lambda name: f'<g class="{name[1]}"' if name[1] else "<g", body)
    body = re.sub(r"#0000([0-9a-f]{2})\b", lambda color: f"var(--{_VARIABLES[int(color[1], 16) - 1]})", body)
    width, height = (round(72 * inches) for inches in axes.figure.get_size_inches())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" class="chart" role="img" '
        f'width="{width}" height="{height}" viewBox="0 0 {width} {height}" style="min-width: {min(0.75 * width, 340):.0f}px" '
        f'aria-label="{html.escape(f"{title}. {description}")}">{body.strip()}'
    )


def number(value: float) -> str:
    """Returns the label of a tick: 1.5k, 0.02, 3e-6."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-4:
        return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:.6g}"


def series_of(records: Sequence[Mapping]) -> dict[str, list[tuple[int, float]]]:
    """Returns name -> [(step, value), ...] of the finite numbers in log records, names in the order of first appearance."""
    series: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for name, value in record.items():
            if name not in _RESERVED and isinstance(value, (int, float)) and math.isfinite(value):
                series.setdefault(name, []).append((record["step"], float(value)))
    return series


def smoothed(values: Sequence[float], width: int) -> np.ndarray:
    """Returns the centered running mean of `values` over `width` of them, fewer at the ends."""
    half = width // 2
    sums, counts = (np.convolve(row, np.ones(2 * half + 1))[half : half + len(row)] for row in (values, np.ones(len(values))))
    return sums / counts


@_style()
def curve(name: str, points: Sequence[tuple[int, float]]) -> str:
    """Returns one panel: a logged quantity against the step, with a running mean if there are many points."""
    title = name.replace("_", " ")
    steps, values = np.array(points, float).T
    values = np.where(np.abs(values) < 1e-100, 0.0, np.clip(values, -1e100, 1e100))  # beyond that it is no measurement
    wide = max(1, len(points) // 20) if len(points) >= 60 else 1
    means = smoothed(values, wide)
    axes = _axes(420, 234, left=62, right=12, top=34, bottom=44, x_label="step")
    _scale(axes.xaxis, steps, steps=True)
    _scale(axes.yaxis, values, log=bool(min(values) > 0 and 30 < max(values) / min(values) < 1e30), ticks=4)
    axes.set_title(title, loc="left", fontsize=14, fontweight="bold", color=_color("ink"))
    axes.set_title(f"last {number(float(f'{values[-1]:.4g}'))}", loc="right", fontsize=12, color=_color("soft"))
    # A chart is 350 pixels wide, and a log may hold a hundred thousand records: draw every n-th, and the last.
    few = np.unique(np.append(np.arange(0, len(points), math.ceil(len(points) / 1500)), len(points) - 1))
    if wide > 1:
        axes.plot(steps[few], values[few], color=_color("accent"), alpha=0.32, linewidth=1)
    dots = {"marker": "o", "markersize": 4.4} if len(points) <= 60 else {}
    axes.plot(steps[few], means[few], color=_color("accent"), linewidth=2, gid="line", clip_on=False, **dots)
    described = (
        f"{len(points)} values from step {steps[0]:.0f} to {steps[-1]:.0f}: first {points[0][1]:.4g}, last {points[-1][1]:.4g}, "
        f"lowest {min(value for _, value in points):.4g}, highest {max(value for _, value in points):.4g}"
    )
    return _svg(axes, title, described)


def curves(records: Sequence[Mapping]) -> list[str]:
    """Returns a panel for each quantity of a run's log that was recorded at least twice; a prefix that all share is left out."""
    series = {name: points for name, points in series_of(records).items() if len(points) > 1}
    prefixes = {name.split("_")[0] for name in series}
    shared = len(prefixes.pop()) + 1 if len(prefixes) == 1 and len(series) > 1 else 0
    return [curve(name[shared:] or name, points) for name, points in series.items()]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One method in the scatter: means over its runs, and standard deviations (None: a single run)."""

    method: str
    x: float
    y: float
    x_std: float | None = None
    y_std: float | None = None


@_style()
def scatter(points: Sequence[Point], x_name: str, y_name: str, *, width: int = 560, height: int = 370) -> str:
    """Returns the chart of two metrics: error bars are one standard deviation, dashed lines pass through `retrain`."""
    points = sorted(points, key=lambda point: point.method == "retrain")  # drawn last, on top
    x_metric, y_metric = describe(x_name), describe(y_name)
    axes = _axes(width, height, left=76, right=26, top=22, bottom=54, x_label="")
    _metric_scale(axes.xaxis, x_metric, [p.x for p in points], [p.x_std or 0.0 for p in points], ticks=width // 110)
    _metric_scale(axes.yaxis, y_metric, [p.y for p in points], [p.y_std or 0.0 for p in points], ticks=height // 80)
    for p in points:
        color = _of_method(p.method)
        if p.method == "retrain":
            for line in (axes.axvline(p.x), axes.axhline(p.y)):
                line.set(color=color, alpha=0.5, linestyle=(0, (5, 5)), linewidth=1, gid="gold")
        bars = {"xerr": p.x_std or None, "yerr": p.y_std or None}
        for bar in axes.errorbar(p.x, p.y, **bars, fmt="none", color=color, capsize=4, elinewidth=1.6)[2]:
            bar.set_gid(f"error m-{p.method}")
        hollow = p.method == "pretrained"
        axes.plot(
            p.x,
            p.y,
            gid=f"point m-{p.method}",
            linestyle="none",
            marker="*" if p.method == "retrain" else "o",
            markersize={"retrain": 20, "retrack": 14}.get(p.method, 11),
            markerfacecolor=_color("paper") if hollow else color,
            markeredgecolor=color if hollow else _color("paper"),
            markeredgewidth=2.2 if hollow else 1.5,
            zorder=3,
        )
    _label(axes, points)
    described = "; ".join(
        f"{method_label(p.method)}: {x_metric.label} {x_metric.spread(p.x, p.x_std)}, "
        f"{y_metric.label} {y_metric.spread(p.y, p.y_std)}"
        for p in points
    )
    return _svg(axes, f"{y_metric.label} against {x_metric.label}", described)


def close_up(points: Sequence[Point]) -> list[Point]:
    """Returns the points whose quality is within a factor of two of `retrain`'s, or without it of `pretrained`'s.

    One diverged method would press all others into a corner. All points come back if a close-up would show nothing more.
    """
    center = next((p.y for method in ("retrain", "pretrained") for p in points if p.method == method), None)
    if not center or center < 0 or min(p.y for p in points) < 0:
        return list(points)
    near = [p for p in points if center / 2 <= p.y <= 2 * center]
    return near if len(near) > 2 else list(points)


def _metric_scale(axis, metric: Metric, values, stds, ticks: int) -> None:
    percent = metric.style == "percent"
    log = min(values) > 0 and max(values) / min(values) > 10 and not percent
    ends = [end for value, std in zip(values, stds, strict=True) for end in (value - std, value, value + std)]
    # An error bar that reaches below zero must not take a logarithmic axis away from a metric that is positive.
    _scale(axis, [end for end in ends if end > 0 or not log], log=log, percent=percent, ticks=ticks)
    word = "more forgotten" if metric.about == "forgetting" else "better"
    way = {"lower": f" (← {word})", "higher": f" ({word} →)"}.get(metric.better, "")
    axis.set_label_text(metric.label + (", log scale" if log else "") + way)


def _label(axes, points: Sequence[Point]) -> None:
    """Writes each method's name near its point, in the place that overlaps points, error bars and earlier names least."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    renderer = FigureCanvasAgg(axes.figure).get_renderer()
    inside = axes.get_window_extent()
    taken, names = [], []
    for p in points:
        (x, y), (right, top) = axes.transData.transform([(p.x, p.y), (p.x + (p.x_std or 0.0), p.y + (p.y_std or 0.0))])
        taken += [Bbox.from_extents(x - w, y - h, x + w, y + h) for w, h in ((9, 9), (right - x + 2, 4), (4, top - y + 2))]
    for p in points:
        text = axes.annotate(method_label(p.method), (p.x, p.y), (0, 0), textcoords="offset points", va="center", zorder=4)
        weight = "bold" if p.method in ("retrack", "retrain") else "normal"
        text.set(fontsize=13, fontweight=weight, color=_of_method(p.method), gid="label")

        def cost(place, text=text):
            text.set(position=place[:2], ha=place[2])
            box = text.get_window_extent(renderer)
            clear = inside.x0 <= box.x0 and box.x1 <= inside.x1 + 20 and inside.y0 <= box.y0 and box.y1 <= inside.y1 + 12
            return 1e6 * (not clear) + 100 * _overlap(box.padded(5, 1), names) + _overlap(box, taken)

        places = []
        for gap in (12, 22, 36, 52, 70, 90, 110):
            places += [(gap, 0, "left"), (-gap, 0, "right"), (0, gap + 6, "center"), (0, -gap - 6, "center")]
            places += [(0.7 * way * gap, up * gap, "left" if way > 0 else "right") for up in (1, -1) for way in (1, -1)]
        cost(best := min(places, key=cost))  # the first of equals: near and to the right
        names.append(text.get_window_extent(renderer))
        if abs(best[0]) + abs(best[1]) > 40:
            arrow = {"arrowstyle": "-", "color": _color("soft"), "alpha": 0.6}
            axes.annotate("", (p.x, p.y), best[:2], textcoords="offset points", arrowprops=arrow)


def _overlap(box, others) -> float:
    """The area, in square pixels, that `box` shares with the others."""
    sides = ((min(box.x1, o.x1) - max(box.x0, o.x0), min(box.y1, o.y1) - max(box.y0, o.y0)) for o in others)
    return sum(max(0.0, width) * max(0.0, height) for width, height in sides)


@_style()
def relearning_chart(runs: Mapping[str, Mapping], title: str) -> str:
    """Returns the chart of `method -> {"steps", "values", "threshold"}`: one line each, with its name at the end."""
    width, height, right, bottom = 500, 340, 116, 54
    axes = _axes(width, height, left=70, right=right, top=22, bottom=bottom, x_label="steps of fine-tuning")
    threshold = statistics.fmean(one["threshold"] for one in runs.values())
    values = [threshold, *(value for one in runs.values() for value in one["values"])]
    log = min(values) > 0 and 30 < max(values) / min(values) < 1e30
    _scale(axes.xaxis, [step for one in runs.values() for step in one["steps"]], steps=True)
    _scale(axes.yaxis, values, log=log, ticks=4)
    axes.set_ylabel(describe("forget_loss").label + (", log scale" if log else ""))
    axes.axhline(threshold, color=_of_method("retrain"), alpha=0.5, linestyle=(0, (5, 5)), linewidth=1, gid="gold")
    ends = []
    for method, one in runs.items():
        axes.plot(one["steps"], one["values"], color=_of_method(method), linewidth=2, gid=f"line m-{method}")
        ends.append((axes.transData.transform((one["steps"][-1], one["values"][-1]))[1], method))
    place = bottom - 5
    for count, (end, method) in enumerate(sorted(ends)):
        # Names one above the other, each as near to the end of its line as the others let it.
        place = min(max(end, place + 17), height - 8 - 17 * (len(ends) - 1 - count))
        text = axes.figure.text(1 - (right - 12) / width, place / height, method_label(method), va="center", gid="label")
        text.set(fontsize=13, color=_of_method(method))
    described = "; ".join(
        f"{method_label(m)}: from {figures(one['values'][0])} to {figures(one['values'][-1])} in {one['steps'][-1]} steps"
        for m, one in runs.items()
    )
    return _svg(axes, title, described)
