"""Charts are well-formed SVG that puts each number where its axis says, in the colors of the page."""

import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from retrack_jax.report.charts import Point, close_up, curve, curves, number, relearning_chart, scatter, series_of, smoothed
from retrack_jax.report.page import standalone_svg

SVG = "{http://www.w3.org/2000/svg}"
POINTS = [
    Point(method="pretrained", x=0.05, y=6.0),
    Point(method="retrain", x=0.0, y=6.2, x_std=0.001, y_std=0.3),
    Point(method="retrack", x=0.0, y=6.9, x_std=0.0, y_std=0.4),
    Point(method="neggrad", x=0.0, y=212.0, x_std=0.0, y_std=30.0),
]
RELEARNING = {
    "retrack": {"steps": [0, 10, 20], "values": [40.0, 12.0, 4.0], "threshold": 5.0},
    "retrain": {"steps": [0, 10, 20], "values": [41.0, 30.0, 20.0], "threshold": 5.0},
    "siss": {"steps": [0, 10, 20], "values": [42.0, 29.0, 20.1], "threshold": 5.0},
}


def parsed(svg):
    return ElementTree.fromstring(svg)


def words(svg):
    return {element.text for element in parsed(svg).iter(f"{SVG}text")}


def groups(svg) -> dict[str, list]:
    """class -> the groups that have it, in the order in which they are drawn."""
    named = {}
    for element in parsed(svg).iter(f"{SVG}g"):
        named.setdefault(element.get("class"), []).append(element)
    return named


def place(group) -> tuple[float, float]:
    """Where a group's marker stands."""
    use = group.find(f".//{SVG}use")
    return float(use.get("x")), float(use.get("y"))


def path(group) -> list[tuple[float, float]]:
    return [tuple(map(float, pair)) for pair in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", group.find(f"{SVG}path").get("d"))]


def labels(svg, width=7.3) -> dict[str, tuple[float, float, float]]:
    """Name -> left, right and middle height of each label, of letters that are `width` pixels wide."""
    boxes = {}
    for group in groups(svg)["label"]:
        text = group.find(f"{SVG}text")
        place = re.search(r"translate\(([-\d.]+) ([-\d.]+)\)", text.get("transform") or "")
        x, y = map(float, place.groups() if place else (text.get("x"), text.get("y")))
        anchor = {"middle": 0.5, "end": 1.0}.get(re.search(r"text-anchor: (\w+)|$", text.get("style"))[1], 0.0)
        size = width * len(text.text)
        boxes[text.text] = (x - anchor * size, x + (1 - anchor) * size, y)
    return boxes


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
    loss, norm = curves(records)
    assert "loss" in words(loss) and "grad norm" in words(norm)


def test_running_mean_keeps_constants_and_means():
    assert smoothed([3.0] * 7, 3) == pytest.approx([3.0] * 7)
    assert smoothed([0.0, 3.0, 6.0], 3) == pytest.approx([1.5, 3.0, 4.5])
    assert smoothed([1.0, 5.0], 1) == pytest.approx([1.0, 5.0])


def test_curve_points_lie_on_the_scale():
    svg = curve("train_loss", [(0, 10.0), (50, 20.0), (100, 40.0)])
    (x0, y0), (x1, y1), (x2, y2) = path(groups(svg)["line"][0])
    assert x0 < x1 < x2 and y0 > y1 > y2
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11) and 2 * (y0 - y1) == pytest.approx(y1 - y2, abs=0.11)
    assert "3 values from step 0 to 100" in parsed(svg).get("aria-label")


def test_long_logs_stay_small():
    assert len(curve("loss", [(i, math.sin(i) + 2) for i in range(100_000)])) < 120_000


def test_scatter_marks_retrain_with_a_star_and_two_lines():
    svg = scatter(POINTS, "frequency", "fid")
    drawn = groups(svg)
    assert len(drawn["gold"]) == 2
    assert {name for name in drawn if name and name.startswith("point")} == {f"point m-{p.method}" for p in POINTS}
    shape = {p.method: drawn[f"point m-{p.method}"][0].find(f".//{SVG}path") for p in POINTS}
    assert "C" not in shape["retrain"].get("d") and "C" in shape["retrack"].get("d")  # a star has no round corner
    fills = {p.method: drawn[f"point m-{p.method}"][0].find(f".//{SVG}use").get("style") for p in POINTS}
    assert "fill: var(--paper)" in fills["pretrained"] and "fill: var(--m-retrack)" in fills["retrack"]
    assert "6.90 ± 0.40" in parsed(svg).get("aria-label")
    names = {"ReTrack", "NegGrad", "Retrain", "Pretrained"}
    assert names | {"FID, log scale (← better)", "Frequency (← more forgotten)"} <= words(svg)


def test_error_bars_span_one_deviation_each_side():
    points = [Point(method="siss", x=1.0, y=10.0, x_std=0.5, y_std=2.0), Point(method="vanilla", x=3.0, y=14.0)]
    drawn = groups(scatter(points, "nll_bits_per_dim", "inception_score"))
    assert "error m-vanilla" not in drawn
    (siss_x, siss_y), (vanilla_x, vanilla_y) = (place(drawn[f"point m-{method}"][0]) for method in ("siss", "vanilla"))
    lengths = [[abs(b - a) for a, b in zip(*path(bar), strict=True)] for bar in drawn["error m-siss"]]
    assert lengths[0] == pytest.approx([(vanilla_x - siss_x) / 2, 0.0], abs=0.1)
    assert lengths[1] == pytest.approx([0.0, siss_y - vanilla_y], abs=0.1)


CROWD = [Point(method=m, x=0.0, y=6.0 + i / 100) for i, m in enumerate(("siss", "siss_no_is", "retrain", "retrack", "vanilla"))]


@pytest.mark.parametrize("points", [POINTS, CROWD, [*CROWD, Point(method="erasediff", x=0.0, y=6.0), POINTS[0], POINTS[3]]])
def test_labels_do_not_cover_each_other(points):
    boxes = list(labels(scatter(points, "frequency", "fid")).values())
    assert len(boxes) == len(points)
    for i, (left, right, y) in enumerate(boxes):
        for left2, right2, y2 in boxes[i + 1 :]:
            assert right <= left2 or right2 <= left or abs(y - y2) >= 13


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_an_axis_of_shares_stays_within_0_and_100_percent(share):
    svg = scatter([Point(method="siss", x=share, y=6.0), Point(method="vanilla", x=share, y=7.0)], "frequency", "fid")
    shares = [float(text.rstrip("%")) for text in words(svg) if text and re.fullmatch(r"[-−\d.]+%", text)]
    assert len(shares) > 2 and 100 * share in shares and min(shares) >= 0 and max(shares) <= 100
    assert max(shares) - min(shares) <= 1


def test_close_up_leaves_out_what_diverged():
    assert [p.method for p in close_up(POINTS)] == ["pretrained", "retrain", "retrack"]
    assert close_up(POINTS[:2]) == POINTS[:2]


def test_standalone_chart_needs_no_page():
    text = standalone_svg(scatter(POINTS, "frequency", "fid"))
    svg = parsed(text)
    assert svg.tag == f"{SVG}svg" and svg.find(f"{SVG}style") is not None
    used = set(re.findall(r"var\((--[\w-]+)", text))
    assert "--m-retrack" in used and used <= set(re.findall(r"(--[\w-]+):", text))


def test_charts_take_every_color_from_the_page_and_share_no_names():
    svg = scatter(POINTS, "frequency", "fid")
    assert set(re.findall(r"(?:fill|stroke): ?([^;\"]*)", svg)) <= {"none"} | set(re.findall(r"var\(--[\w-]+\)", svg))
    assert all(re.fullmatch(r"[a-z][0-9a-f]+", name) for name in re.findall(r' id="([^"]*)"', svg))  # by their content alone


def test_relearning_chart_names_every_line_at_its_end():
    svg = relearning_chart(RELEARNING, "title")
    drawn = groups(svg)
    assert {name for name in drawn if name and name.startswith("line")} == {"line m-retrack", "line m-retrain", "line m-siss"}
    assert len(drawn["gold"]) == 1
    heights = {name: y for name, (_, _, y) in labels(svg).items()}
    assert set(heights) == {"ReTrack", "Retrain", "SISS"} and max(heights, key=heights.get) == "ReTrack"
    ordered = sorted(heights.values())
    assert min(b - a for a, b in zip(ordered, ordered[1:], strict=False)) >= 14.9  # two ends at one height do not overlap
    many = {f"m{i}": {"steps": [0, 1], "values": [9.0, 1.0], "threshold": 1.0} for i in range(8)}
    places = [y for _, _, y in labels(relearning_chart(many, "")).values()]
    assert len(places) == 8 and max(places) < 340 - 54 + 8  # none falls below the axis


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=2, max_size=20))
@example([0.0, 5e-324])
@example([5e-323, 1.7e308])
@example([1.0, math.nextafter(1.0, 2.0)])
@settings(max_examples=20, deadline=None)
def test_any_finite_values_give_a_chart_that_holds_them(values):
    points = path(groups(curve("loss", list(enumerate(values))))["line"][0])
    assert all(0 <= x <= 420 and 0 <= y <= 234 for x, y in points)


def test_labels_of_ticks_are_short():
    assert [number(v) for v in (0, 0.05, 10_000, 2e6, 3e-6)] == ["0", "0.05", "10k", "2e6", "3e-6"]
    # Ticks half a step apart have labels of their own.
    assert [number(v) for v in (1.5e6, 2.5e6, -1.5e-5, 1.25e12)] == ["1.5e6", "2.5e6", "-1.5e-5", "1.25e12"]


def test_the_same_numbers_give_the_same_bytes_in_another_process():
    code = "from retrack_jax.report.charts import curve; print(curve('loss', [(0, 1.0), (1, 3.0)]), end='')"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert other == curve("loss", [(0, 1.0), (1, 3.0)])


def test_a_page_is_imported_without_its_libraries():
    code = "import sys, retrack_jax.report.html, retrack_jax.report.comparison; print({'matplotlib', 'jinja2'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


def test_the_last_value_is_that_of_the_log():
    """Not of the running mean that the line shows."""
    texts = [text.text for text in parsed(curve("loss", [(step, float(step)) for step in range(100)])).iter(f"{SVG}text")]
    assert "last 99" in texts
