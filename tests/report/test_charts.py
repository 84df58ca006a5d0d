"""Charts are well-formed SVG that puts each number where its axis says."""

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from retrack_jax.report.charts import Point, close_up, curve, curves, scatter, series_of, smoothed
from retrack_jax.report.page import standalone_svg
from retrack_jax.report.svg import Scale, fitted, number

POINTS = [
    Point(method="pretrained", x=0.05, y=6.0),
    Point(method="retrain", x=0.0, y=6.2, x_std=0.001, y_std=0.3, runs=3),
    Point(method="retrack", x=0.0, y=6.9, x_std=0.0, y_std=0.4, runs=3),
    Point(method="neggrad", x=0.0, y=212.0, x_std=0.0, y_std=30.0, runs=3),
]


def parsed(svg):
    return ElementTree.fromstring(svg)


def test_log_records_become_series_of_finite_numbers():
    records = [
        {"step": 1, "time": 9.0, "train_loss": 2.0},
        {"step": 2, "time": 9.5, "train_loss": "nan", "eval_fid": 3.0},
        {"step": 3, "time": 9.9, "train_loss": 1.0},
    ]
    assert series_of(records) == {"train_loss": [(1, 2.0), (3, 1.0)], "eval_fid": [(2, 3.0)]}
    assert len(curves(records)) == 1  # one point is no curve


def test_a_prefix_that_all_share_is_left_out_of_titles():
    records = [{"step": i, "unlearn_loss": 1.0, "unlearn_grad_norm": 2.0} for i in range(3)]
    titles = [text.text for svg in curves(records) for text in parsed(svg).iter("text") if text.get("class") == "title"]
    assert titles == ["loss", "grad norm"]


def test_running_mean_keeps_constants_and_means():
    assert smoothed([3.0] * 7, 3) == pytest.approx([3.0] * 7)
    assert smoothed([0.0, 3.0, 6.0], 3) == pytest.approx([1.5, 3.0, 4.5])
    assert smoothed([1.0, 5.0], 1) == [1.0, 5.0]


def test_curve_points_lie_on_the_scale():
    svg = parsed(curve("train_loss", [(0, 10.0), (50, 20.0), (100, 30.0)]))
    points = [tuple(map(float, p.split(","))) for p in svg.find("polyline").get("points").split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x0 < x1 < x2 and y0 > y1 > y2
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11) and y0 - y1 == pytest.approx(y1 - y2, abs=0.11)
    assert "3 values from step 0 to 100" in svg.get("aria-label")


def test_long_logs_stay_small():
    assert len(curve("loss", [(i, math.sin(i) + 2) for i in range(100_000)])) < 100_000


def test_scatter_marks_retrain_with_a_star_and_two_lines():
    svg = parsed(scatter(POINTS, "frequency", "fid"))
    star = [e for e in svg.iter("polygon")]
    gold = [e for e in svg.iter("line") if e.get("class") == "gold"]
    assert len(star) == 1 and "Retrain" in star[0].find("title").text and len(gold) == 2
    circles = {c.get("class"): c for c in svg.iter("circle")}
    assert set(circles) == {"point m-pretrained hollow", "point m-retrack", "point m-neggrad"}
    assert "6.90 ± 0.40" in circles["point m-retrack"].find("title").text
    words = {e.text for e in svg.iter("text")}
    assert {"ReTrack", "NegGrad", "Retrain", "Pretrained", "FID, log scale (← better)", "Frequency (← more forgotten)"} <= words


def test_error_bars_span_one_deviation_each_side():
    points = [Point(method="siss", x=1.0, y=10.0, x_std=0.5, y_std=2.0, runs=3), Point(method="vanilla", x=3.0, y=14.0)]
    svg = parsed(scatter(points, "nll_bits_per_dim", "inception_score"))
    bars = [e for e in svg.iter("path") if "error" in e.get("class")]
    assert len(bars) == 1
    circles = {c.get("class").split("-")[1]: (float(c.get("cx")), float(c.get("cy"))) for c in svg.iter("circle")}
    per_unit_y = (circles["siss"][1] - circles["vanilla"][1]) / 4.0
    bottom, top = map(float, re.search(r"M[\d.]+,([\d.]+)V([\d.]+)", bars[0].get("d")).groups())
    assert bottom - top == pytest.approx(4.0 * per_unit_y, abs=0.3)


def test_labels_do_not_cover_each_other():
    svg = parsed(scatter(POINTS, "frequency", "fid"))
    boxes = [(float(e.get("x")), float(e.get("y")), 7.3 * len(e.text)) for e in svg.iter("text") if "label" in e.get("class")]
    for i, (x, y, width) in enumerate(boxes):
        for x2, y2, width2 in boxes[i + 1 :]:
            assert x + width <= x2 or x2 + width2 <= x or abs(y - y2) >= 14


def test_close_up_leaves_out_what_diverged():
    assert [p.method for p in close_up(POINTS)] == ["pretrained", "retrain", "retrack"]
    assert close_up(POINTS[:2]) == POINTS[:2]


def test_standalone_chart_needs_no_page():
    text = standalone_svg(scatter(POINTS, "frequency", "fid"))
    svg = parsed(text)
    assert svg.tag == "{http://www.w3.org/2000/svg}svg" and svg.find("{http://www.w3.org/2000/svg}style") is not None
    assert set(re.findall(r"var\((--[\w-]+)", text)) - {"--c"} <= set(re.findall(r"(--[\w-]+):", text))


@given(st.lists(st.floats(-1e12, 1e12, allow_nan=False), min_size=1, max_size=20))
@example([0.0, 5e-324])
@example([5e-323])
@settings(max_examples=60, deadline=None)
def test_scales_hold_all_values_and_ticks_are_inside(values):
    scale = fitted(values, 0.0, 100.0)
    assert all(-1e-6 <= scale(value) <= 100 + 1e-6 for value in values)
    ticks = scale.ticks()
    assert len(ticks) <= 20 and all(-1.0 <= scale(tick) <= 101.0 for tick in ticks)
    assert all(number(tick) for tick in ticks)


def test_logarithmic_ticks_are_round():
    assert Scale(0.5, 300.0, 0.0, 1.0, True).ticks() == pytest.approx([1, 10, 100])
    assert Scale(4.0, 60.0, 0.0, 1.0, True).ticks() == pytest.approx([5, 10, 20, 50])
    assert [number(v) for v in (0, 0.05, 10_000, 2e6, 3e-6)] == ["0", "0.05", "10k", "2e6", "3e-6"]
