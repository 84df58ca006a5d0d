"""Axes for charts as inline SVG text: scales, ticks, gridlines, labels. Colours come from the page's CSS variables.

Hand-written SVG rather than a plotting library's: it follows the page's light or dark theme, scales, prints sharp, and can be
read by a screen reader.
"""

import html
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """A map from values in [low, high] to pixels in [start, stop], linear or logarithmic."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        value = math.log10(max(value, self.low)) if self.log else value
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Returns about `count` round values inside the range."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = (1,) if self.high / self.low > 300 else (1, 2, 5)
            stride = math.ceil((last - first) / (2 * count))
            ticks = [step * 10.0**power for power in range(first, last + 1, stride) for step in steps]
            return [tick for tick in ticks if self.low * 0.999 <= tick <= self.high * 1.001]
        rough = (self.high - self.low) / count
        power = 10 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
        return [i * step for i in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]


def fitted(values, start: float, stop: float, *, pad: float = 0.06, log: bool | None = None, floor: float | None = None) -> Scale:
    """Returns a scale that holds all finite `values` with some room.

    Args:
      log: None chooses a logarithmic axis where all values are positive and the largest is over 30 times the smallest.
      floor: a bound that the room must not cross, such as 0 for a share.
    """
    # A value below 1e-200 is no measurement, and a range as small has no logarithm.
    values = [float(value) if abs(value) > 1e-200 else 0.0 for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(values), max(values)
    if log is None:
        log = low > 0 and 30 < high / low < 1e30  # beyond that it is no measurement
    if log:
        room = (high / low) ** pad
        return Scale(low / room / 1.05, high * room * 1.05, start, stop, True)
    if high == low:
        spread = abs(high) * 0.1 or 1.0
        low, high = low - spread, high + spread
    room = (high - low) * pad
    bottom = low - room if floor is None else max(floor, low - room) if low >= floor else low - room
    return Scale(bottom, high + room, start, stop)


def number(value: float) -> str:
    """Returns a tick label: 1.5k, 0.02, 3e-6."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-4:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.6g}"


def text(x, y, content, *, kind="tick", anchor="middle", extra="") -> str:
    """Returns a text element; `kind` is its CSS class."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{html.escape(str(content))}</text>'


def axes(
    x: Scale, y: Scale, *, x_label: str, y_label: str, x_text=number, y_text=number, x_ticks: int = 5, y_ticks: int = 4
) -> str:
    """Returns gridlines, tick labels and axis titles around the area of the two scales."""
    parts = []
    for tick in y.ticks(y_ticks):
        parts.append(f'<line class="grid" x1="{x.start:.1f}" x2="{x.stop:.1f}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(text(x.start - 8, y(tick) + 4, y_text(tick), anchor="end"))
    for tick in x.ticks(x_ticks):
        parts.append(f'<line class="mark" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{y.start:.1f}" y2="{y.start + 4:.1f}"/>')
        parts.append(text(x(tick), y.start + 18, x_text(tick)))
    parts.append(f'<line class="base" x1="{x.start:.1f}" x2="{x.stop:.1f}" y1="{y.start:.1f}" y2="{y.start:.1f}"/>')
    if x_label:
        parts.append(text((x.start + x.stop) / 2, y.start + 38, x_label, kind="axis"))
    if y_label:
        middle = (y.start + y.stop) / 2
        parts.append(text(16, middle, y_label, kind="axis", extra=f' transform="rotate(-90 16 {middle:.1f})"'))
    return "".join(parts)


def figure(width: int, height: int, title: str, description: str, body: str) -> str:
    """Returns an `<svg>` element with a name and a description for screen readers, scaling to the width it is given."""
    return (
        f'<svg class="chart" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{html.escape(title)}. {html.escape(description)}">'
        f"{body}</svg>"
    )
