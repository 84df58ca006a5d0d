"""Charts as SVG text: curves from `log.jsonl`, and unlearning strength against quality with error bars and `retrain` marked."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from retrack_jax.report.catalogue import Metric, describe, method_label
from retrack_jax.report.svg import Scale, axes, figure, fitted, number, text

_RESERVED = ("step", "time")


def series_of(records: Sequence[Mapping]) -> dict[str, list[tuple[int, float]]]:
    """Returns name -> [(step, value), ...] of the finite numbers in log records, names in the order of first appearance."""
    series: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for name, value in record.items():
            if name not in _RESERVED and isinstance(value, (int, float)) and math.isfinite(value):
                series.setdefault(name, []).append((record["step"], float(value)))
    return series


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """Returns the centred running mean of `values` over `width` of them, fewer at the ends."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    half = width // 2
    bounds = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in bounds]


def curve(name: str, points: Sequence[tuple[int, float]], *, log: bool | None = None) -> str:
    """Returns one SVG panel of a logged quantity against the step, with a running mean where there are many points."""
    title = name.replace("_", " ")
    steps, values = [step for step, _ in points], [value for _, value in points]
    wide = max(1, len(points) // 20) if len(points) >= 60 else 1
    means = smoothed(values, wide)
    x = fitted(steps, 62, 408, pad=0.0, log=False)
    y = fitted(values, 190, 34, log=log)
    body = [axes(x, y, x_label="step", y_label=""), text(62, 18, title, kind="title", anchor="start")]
    body.append(text(408, 18, f"last {number(float(f'{means[-1]:.4g}'))}", kind="note", anchor="end"))
    if wide > 1:
        body.append(_polyline(_thinned(points), x, y, "raw"))
    body.append(_polyline(_thinned(list(zip(steps, means, strict=True))), x, y, "line"))
    if len(points) <= 60:
        body += [
            f'<circle class="dot" cx="{x(s):.1f}" cy="{y(v):.1f}" r="2.2"><title>step {s}: {v:.6g}</title></circle>'
            for s, v in points
        ]
    described = (
        f"{len(points)} values from step {steps[0]} to {steps[-1]}: first {values[0]:.4g}, last {values[-1]:.4g}, "
        f"lowest {min(values):.4g}, highest {max(values):.4g}"
    )
    return figure(420, 234, title, described, "".join(body))


def curves(records: Sequence[Mapping]) -> list[str]:
    """Returns a panel for each quantity of a run's log that was recorded at least twice; a prefix that all share is left out."""
    series = {name: points for name, points in series_of(records).items() if len(points) > 1}
    prefixes = {name.split("_")[0] for name in series}
    shared = len(prefixes.pop()) + 1 if len(prefixes) == 1 and len(series) > 1 else 0
    return [curve(name[shared:] or name, points) for name, points in series.items()]


def _thinned(points, most: int = 1500):
    """Every n-th point, the last kept: a chart is 350 pixels wide, and a log may hold a hundred thousand records."""
    stride = math.ceil(len(points) / most)
    return points[::stride] + ([points[-1]] if stride > 1 else [])


def _polyline(points, x: Scale, y: Scale, kind: str) -> str:
    return f'<polyline class="{kind}" points="{" ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in points)}"/>'


@dataclass(frozen=True, kw_only=True)
class Point:
    """One method in the scatter: means over its runs, and standard deviations (None: a single run)."""

    method: str
    x: float
    y: float
    x_std: float | None = None
    y_std: float | None = None
    runs: int = 1


def scatter(
    points: Sequence[Point], x_metric: Metric | str, y_metric: Metric | str, *, width: int = 720, height: int = 430
) -> str:
    """Returns the SVG of strength against quality: error bars are one standard deviation, dashed lines pass through `retrain`."""
    points = sorted(points, key=lambda point: point.method == "retrain")  # drawn last, on top
    x_metric, y_metric = (describe(metric) if isinstance(metric, str) else metric for metric in (x_metric, y_metric))
    x = _axis([p.x for p in points], [p.x_std for p in points], 76, width - 26, x_metric)
    y = _axis([p.y for p in points], [p.y_std for p in points], height - 62, 22, y_metric)
    body = [
        axes(
            x,
            y,
            x_label=_axis_title(x_metric, x.log, "←", "→"),
            y_label=_axis_title(y_metric, y.log, "←", "→"),
            x_text=_tick_text(x_metric),
            y_text=_tick_text(y_metric),
            x_ticks=width // 110,
            y_ticks=height // 80,
        )
    ]
    for point in points:
        if point.method == "retrain":
            body.append(f'<line class="gold" x1="{x(point.x):.1f}" x2="{x(point.x):.1f}" y1="{y.start}" y2="{y.stop}"/>')
            body.append(f'<line class="gold" x1="{x.start}" x2="{x.stop}" y1="{y(point.y):.1f}" y2="{y(point.y):.1f}"/>')
    body += [_error_bars(point, x, y) for point in points] + [_marker(point, x, y, x_metric, y_metric) for point in points]
    body += _labels(points, x, y)
    described = "; ".join(
        f"{method_label(p.method)}: {x_metric.label} {x_metric.spread(p.x, p.x_std)}, "
        f"{y_metric.label} {y_metric.spread(p.y, p.y_std)}"
        for p in points
    )
    return figure(width, height, f"{y_metric.label} against {x_metric.label}", described, "".join(body))


def close_up(points: Sequence[Point]) -> list[Point]:
    """Returns the points whose quality is within a factor of two of `retrain`'s, or without it of `pretrained`'s.

    One diverged method would else press all others into a corner. All points come back where nothing would be gained.
    """
    center = next((p.y for method in ("retrain", "pretrained") for p in points if p.method == method), None)
    if not center or center < 0 or min(p.y for p in points) < 0:
        return list(points)
    near = [p for p in points if center / 2 <= p.y <= 2 * center]
    return near if len(near) > 2 else list(points)


def _axis(values, stds, start, stop, metric: Metric) -> Scale:
    ends = [value + sign * (std or 0.0) for value, std in zip(values, stds, strict=True) for sign in (-1, 1)]
    # An error bar that reaches below zero must not take a logarithmic axis away from a metric that is positive.
    log = min(values) > 0 and max(values) / min(values) > 10 and metric.style != "percent"
    if log:
        ends = [end if end > 0 else value for end, value in zip(ends, [v for v in values for _ in (0, 1)], strict=True)]
    return fitted(ends, start, stop, pad=0.08, log=log)


def _axis_title(metric: Metric, log: bool, low: str, high: str) -> str:
    word = "more forgotten" if metric.about == "forgetting" else "better"
    title = metric.label + (", log scale" if log else "")
    if metric.better == "lower":
        return f"{title} ({low} {word})"
    return f"{title} ({word} {high})" if metric.better == "higher" else title


def _tick_text(metric: Metric):
    return (lambda value: f"{round(100 * value, 6):g}%") if metric.style == "percent" else number


def _error_bars(point: Point, x: Scale, y: Scale) -> str:
    parts = []
    cx, cy = x(point.x), y(point.y)
    if point.x_std:
        left, right = x(max(point.x - point.x_std, x.low)), x(point.x + point.x_std)
        parts.append(f"M{left:.1f},{cy:.1f}H{right:.1f}M{left:.1f},{cy - 4:.1f}v8M{right:.1f},{cy - 4:.1f}v8")
    if point.y_std:
        bottom, top = y(max(point.y - point.y_std, y.low)), y(point.y + point.y_std)
        parts.append(f"M{cx:.1f},{bottom:.1f}V{top:.1f}M{cx - 4:.1f},{bottom:.1f}h8M{cx - 4:.1f},{top:.1f}h8")
    return f'<path class="error m-{html.escape(point.method)}" d="{"".join(parts)}"/>' if parts else ""


def _marker(point: Point, x: Scale, y: Scale, x_metric: Metric, y_metric: Metric) -> str:
    cx, cy, method = x(point.x), y(point.y), html.escape(point.method)
    runs = f"{point.runs} run{'s' * (point.runs != 1)}"
    tip = (
        f"{method_label(point.method)}, {runs}\n{x_metric.label} {x_metric.spread(point.x, point.x_std)}\n"
        f"{y_metric.label} {y_metric.spread(point.y, point.y_std)}"
    )
    tip = f"<title>{html.escape(tip)}</title>"
    if point.method == "retrain":
        corners = " ".join(
            f"{cx + r * math.sin(a):.1f},{cy - r * math.cos(a):.1f}"
            for a, r in ((i * math.pi / 5, (10, 4.2)[i % 2]) for i in range(10))
        )
        return f'<polygon class="point m-{method}" points="{corners}">{tip}</polygon>'
    hollow = " hollow" if point.method == "pretrained" else ""
    radius = 7 if method == "retrack" else 5.5
    return f'<circle class="point m-{method}{hollow}" cx="{cx:.1f}" cy="{cy:.1f}" r="{radius}">{tip}</circle>'


def _labels(points: Sequence[Point], x: Scale, y: Scale) -> list[str]:
    """Places each label at the free side of its point: the candidate that overlaps points, bars and earlier labels least."""
    placed, parts = [], []
    for p in points:
        cx, cy = x(p.x), y(p.y)
        wide, tall = (abs(scale(v + (std or 0.0)) - scale(v)) for scale, v, std in ((x, p.x, p.x_std), (y, p.y, p.y_std)))
        placed += [(cx - 9, cy - 9, cx + 9, cy + 9), (cx - wide - 2, cy - 4, cx + wide + 2, cy + 4)]
        placed.append((cx - 4, cy - tall - 2, cx + 4, cy + tall + 2))
    for p in points:
        cx, cy, label, method = x(p.x), y(p.y), method_label(p.method), p.method
        width, height = 7.3 * len(label), 15

        def boxes(cx=cx, cy=cy, width=width, height=height):
            for gap in (12, 22, 36):
                yield cx + gap, cy - height / 2
                yield cx - gap - width, cy - height / 2
                yield cx - width / 2, cy - gap - height
                yield cx - width / 2, cy + gap
                for dy in (-gap - height / 2, gap - height / 2):
                    yield cx + gap * 0.7, cy + dy
                    yield cx - gap * 0.7 - width, cy + dy

        def cost(corner, width=width, height=height):
            left, top = corner
            box = (left, top, left + width, top + height)
            outside = box[0] < x.start or box[1] < y.stop - 8 or box[2] > x.stop + 20 or box[3] > y.start
            return 1e6 * outside + sum(_overlap(box, other) for other in placed)

        left, top = min(boxes(), key=cost)  # the first of equals: near and to the right
        placed.append((left, top, left + width, top + height))
        kind = "label strong" if method in ("retrack", "retrain") else "label"
        parts.append(text(left, top + 11.5, label, kind=f"{kind} m-{html.escape(method)}", anchor="start"))
    return parts


def _overlap(a, b) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
