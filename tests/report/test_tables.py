"""Cells say what the numbers are, and never that something is better because it is different."""

import pytest

from retrack_jax.report.catalogue import describe, order
from retrack_jax.report.tables import before_after_rows, before_after_text, cell, comparison_columns, comparison_text, signed

METRICS = {
    "method": "retrack",
    "pretrained": {"frequency": 0.0485, "fid": 6.0, "membership_auc": 0.9, "new_metric": 1.0},
    "unlearned": {"frequency": 0.0, "fid": 6.5, "membership_auc": 0.6, "new_metric": 2.0},
    "retrained": {"fid": 6.25},
    "provenance": {"num_samples": 2000},
}
SUMMARY = {
    "methods": {
        "zeta": {"runs": 1, "metrics": {"fid": {"mean": 7.0, "std": None, "runs": 1}}},
        "siss": {
            "runs": 3,
            "metrics": {"fid": {"mean": 8.0, "std": 0.25, "runs": 3}, "frequency": {"mean": 0.01, "std": 0.001, "runs": 3}},
        },
        "pretrained": {"runs": 1, "metrics": {"frequency": {"mean": 0.05, "std": None, "runs": 1}}},
    }
}


def test_rows_have_values_gap_and_verdict():
    rows = {row.name: row for row in before_after_rows(METRICS)}
    assert list(rows) == ["frequency", "fid", "membership_auc", "new_metric"]
    assert (rows["frequency"].before, rows["frequency"].after, rows["frequency"].retrained) == ("4.85%", "0 (< 0.15%)", None)
    assert rows["frequency"].verdict == "better" and rows["fid"].verdict == "worse"
    assert rows["fid"].gap == "+0.25"
    assert rows["membership_auc"].verdict == rows["new_metric"].verdict == ""


def test_the_bound_of_a_frequency_under_labels_is_by_the_samples_under_them():
    metrics = {
        "pretrained": {"label_frequency": 0.3},
        "unlearned": {"label_frequency": 0.0},
        "provenance": {"num_samples": 2000, "metrics": {"label_frequency": {"num_samples": 288}}},
    }
    row = before_after_rows(metrics)[0]
    assert (row.before, row.after) == ("30.00%", "0 (< 1.04%)")


def test_what_was_not_measured_is_below_the_table_with_what_it_needs():
    absent = {"kid": "no weights.pth in /weights"}
    one = before_after_text(METRICS | {"provenance": {"absent": absent}})
    assert one.splitlines()[-1] == comparison_text(SUMMARY | {"absent": absent}).splitlines()[-1]
    assert one.endswith("\nnot measured: KID: no weights.pth in /weights")
    assert "not measured" not in comparison_text(SUMMARY | {"absent": absent}, markdown=True)


@pytest.mark.parametrize(("forgotten", "color"), [("forgotten", "better"), ("unknown", ""), ("singled out", "")])
def test_a_likelihood_is_better_only_if_the_verdict_says_forgotten(forgotten, color):
    models = {
        "provenance": {"num_samples": 200},
        "pretrained": {"frequency": 0.1, "nll_bits_per_dim": 5.9},
        "unlearned": {"frequency": 0.0, "nll_bits_per_dim": 6.1},
    }
    rows = before_after_rows(models | {"verdict": {"forgotten": forgotten}})
    assert [row.verdict for row in rows] == ["better", color]


@pytest.mark.parametrize(
    ("name", "before", "after", "color"),
    [
        ("fid", 22.96, 22.97, ""),
        ("fid", 22.0, 25.0, "worse"),
        ("kid", 0.010, 0.014, ""),  # its spread over subsets is 0.005
        ("kid", 0.010, 0.020, "worse"),
        ("nll_bits_per_dim", 5.90, 5.91, ""),
        ("frequency", 3 / 2000, 2 / 2000, ""),
        ("frequency", 8 / 2000, 0.0, "better"),  # p = 0.008
    ],
)
def test_a_change_within_chance_is_neither_better_nor_worse(name, before, after, color):
    provenance = {"num_samples": 2000, "metrics": {"kid": {"kid_std": 0.005}}}
    metrics = {"pretrained": {name: before}, "unlearned": {name: after}, "provenance": provenance}
    assert before_after_rows(metrics)[0].verdict == color


@pytest.mark.parametrize(
    ("share", "num_samples", "text"),
    [(0.0, 50_000, "0 (< 0.006%)"), (0.0, 100_000, "0 (< 0.003%)"), (2 / 50_000, 50_000, "0.0040%"), (0.048, 2000, "4.80%")],
)
def test_a_rare_sample_is_not_shown_as_none(share, num_samples, text):
    assert cell("frequency", share, num_samples=num_samples) == text
    assert describe("frequency").spread(3 / 250_000, 1.1e-5) == "0.0012 ± 0.0011%"


def test_relearning_steps_of_a_curve_that_ended_are_a_bound_without_a_gap():
    note = {"relearning_steps": {"relearning_steps": {"censored": True}}}
    metrics = {"pretrained": {}, "unlearned": {"relearning_steps": 160}, "retrained": {"relearning_steps": 20}}
    for part in ("metrics", "retrained"):
        metrics["provenance"] = {part: note}
        row = before_after_rows(metrics)[0]
        assert row.gap is None and ">\u00a0" in (row.after if part == "metrics" else row.retrained)
    assert row.after == "160"


def test_rows_bear_missing_models():
    assert before_after_rows({"pretrained": {"fid": 1.0}, "unlearned": None, "retrained": None})[0].after is None
    assert before_after_rows({}) == []


def test_prompts_of_stable_diffusion_keep_their_metric():
    metric = describe("success_rate_modified")
    assert metric.label == "Success rate, modified prompt" and metric.text(0.5) == "50.0%" and metric.better == "higher"
    assert order(["zz", "sscd_modified", "fid", "sscd_original", "fid"]) == ["fid", "sscd_modified", "sscd_original", "zz"]


def test_signs_vanish_with_their_number():
    # Of pixels it is a restored image, of a prompt its samples.
    assert "restores" in describe("sscd").meaning
    assert describe("sscd_original").meaning == describe("sscd_modified").meaning != describe("sscd").meaning
    assert describe("sscd_forgotten").better == "lower" and describe("sscd_kept").better == ""
    assert describe("clip_iqa_kept").label == "CLIP-IQA, kept captions"
    assert "samples of the prompt" in describe("sscd_original").meaning
    fid = describe("fid")
    assert (signed(fid, 0.2), signed(fid, -0.2), signed(fid, 0.001), signed(fid, -0.001)) == ("+0.20", "−0.20", "0.00", "0.00")


def test_terminal_table_is_aligned():
    lines = before_after_text(METRICS).splitlines()
    assert lines[0].split() == ["before", "after", "ReTrack", "retrained"]
    assert len({line.rstrip().rfind("0.15%)") for line in lines if "0.15%" in line}) == 1
    assert lines[3].split() == ["FID", "6.00", "6.50", "6.25"]


def test_comparison_lists_references_first_and_unknown_last():
    lines = comparison_text(SUMMARY).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["Pretrained", "SISS", "zeta"]
    assert "1.00 ± 0.10%" in lines[3] and "8.00 ± 0.25" in lines[3] and "7.00" in lines[4] and "±" not in lines[4]
    markdown = comparison_text(SUMMARY, markdown=True).splitlines()
    assert all(line.startswith("| ") and line.endswith("|") and line.count("|") == 5 for line in markdown)


def test_all_metrics_are_columns_in_the_catalogues_order():
    assert comparison_columns(SUMMARY) == ["frequency", "fid"]
