"""The relearning curves of every method in one chart: how soon fine-tuning brings the forgotten image back."""

from collections.abc import Mapping

from retrack_jax.report.catalogue import describe, method_label
from retrack_jax.report.page import escape
from retrack_jax.report.svg import axes, figure, fitted, text
from retrack_jax.report.tables import method_order

_WIDTH, _HEIGHT, _RIGHT = 500, 340, 116  # the labels stand to the right of the curves
_TITLES = {
    "relearning_steps": "Fine-tuned on the remaining images and one copy of each forgotten one",
    "relearning_steps_remain": "Fine-tuned on the remaining images alone",
}


def relearning_section(summary: Mapping) -> str:
    """Returns the charts of the curves in `summary.json`, with a sentence on how to read them; nothing where there are none."""
    charts = []
    for name, title in _TITLES.items():
        curves = {m: summary["methods"][m].get("relearning", {}).get(name) for m in method_order(summary["methods"])}
        curves = {method: curve for method, curve in curves.items() if curve}
        if curves:
            charts.append(f"<figure>{relearning_chart(curves, title)}<figcaption>{escape(title)}.</figcaption></figure>")
    if not charts:
        return ""
    note = (
        "Loss on the forgotten images while the model is fine-tuned; below the dashed line it is back. A method whose curve "
        "falls sooner than that of <em>retrain</em> had hidden the image rather than forgotten it."
    )
    return f'<p>{note}</p><div class="pair">{"".join(charts)}</div>'


def relearning_chart(curves: Mapping[str, Mapping], title: str) -> str:
    """Returns the SVG of `method -> {"steps", "values", "threshold"}`, a line each, labelled at its end."""
    stop = _WIDTH - _RIGHT
    x = fitted([step for curve in curves.values() for step in curve["steps"]], 62, stop, pad=0.0, log=False)
    threshold = next(iter(curves.values()))["threshold"]
    y = fitted([threshold, *(v for curve in curves.values() for v in curve["values"])], _HEIGHT - 62, 22)
    loss = describe("forget_loss").label
    body = [axes(x, y, x_label="steps of fine-tuning", y_label=loss + (" (log)" if y.log else ""))]
    body.append(f'<line class="gold" x1="62" x2="{stop}" y1="{y(threshold):.1f}" y2="{y(threshold):.1f}"/>')
    ends = []
    for method, curve in curves.items():
        points = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(curve["steps"], curve["values"], strict=True))
        body.append(f'<g class="m-{escape(method)}"><polyline class="of-method" points="{points}"/></g>')
        ends.append((y(curve["values"][-1]), method))
    lowest = -100.0
    for place, method in sorted(ends):
        lowest = max(place, lowest + 15)  # labels one below the other, each as near to its line as the others let it
        label = text(stop + 8, lowest + 4, method_label(method), kind="label", anchor="start")
        body.append(f'<g class="m-{escape(method)}">{label}</g>')
    described = "; ".join(
        f"{method_label(m)}: from {c['values'][0]:.3g} to {c['values'][-1]:.3g} in {c['steps'][-1]} steps"
        for m, c in curves.items()
    )
    return figure(_WIDTH, _HEIGHT, title, described, "".join(body))
