"""The relearning charts: a line and a label for every method, the threshold, and nothing where nothing was measured."""

import re

from retrack_jax.report.relearning import relearning_chart, relearning_section

CURVES = {
    "retrack": {"steps": [0, 10, 20], "values": [40.0, 12.0, 4.0], "threshold": 5.0},
    "retrain": {"steps": [0, 10, 20], "values": [41.0, 30.0, 20.0], "threshold": 5.0},
    "siss": {"steps": [0, 10, 20], "values": [42.0, 29.0, 20.1], "threshold": 5.0},
}


def test_chart():
    svg = relearning_chart(CURVES, "title")
    assert len(re.findall("<polyline", svg)) == 3 and svg.count('class="gold"') == 1
    labels = {name: float(y) for y, name in re.findall(r'<text class="label" x="[\d.]+" y="([\d.]+)"[^>]*>([^<]+)<', svg)}
    assert set(labels) == {"ReTrack", "Retrain", "SISS"}
    heights = sorted(labels.values())
    assert min(b - a for a, b in zip(heights, heights[1:], strict=False)) >= 14.9  # two ends at one height do not overlap
    assert max(labels, key=labels.get) == "ReTrack"  # the lowest curve is the lowest label


def test_section_shows_only_what_was_measured():
    methods = {name: {"relearning": {"relearning_steps": curve}} for name, curve in CURVES.items()}
    methods["vanilla"] = {}
    found = relearning_section({"methods": methods})
    assert found.count("<svg") == 1 and "Vanilla" not in found
    assert relearning_section({"methods": {"vanilla": {}}}) == ""
