"""The pages hold every number they were given, need no network, and are the same bytes for the same inputs."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from retrack_jax.checks import UserError
from retrack_jax.evaluate.aggregate import summarize
from retrack_jax.files import write_npz
from retrack_jax.report.comparison import comparison_report, scatter_points
from retrack_jax.report.html import run_report

IMAGES = np.random.default_rng(0).integers(0, 256, (80, 8, 8, 1), np.uint8)
MASK = np.arange(80) % 20 == 3
METRICS = {
    "config": {"name": "digits", "nested": {"x": 1}},
    "method": "retrack",
    "seed": 0,
    "target": "<script>alert(1)</script>",
    "steps": 50,
    "unlearn_seconds": 9.31,
    "pretrained": {"frequency": 0.05, "fid": 6.0},
    "unlearned": {"frequency": 0.0, "fid": 6.5},
    "retrained": {"fid": 6.25},
    "provenance": {
        "num_samples": 2000,
        "versions": {"jax": "0.10.2"},
        "absent": {"sscd": "no weights & no network"},
        "final": ["sscd"],
    },
}
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that tags close in order, and gathers text, addresses and headings."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.links, self.tags, self.alts = [], "", [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        self.alts += [dict(attrs).get("alt")] if tag == "img" else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open and self.open[-1] != "style" else ""


@pytest.fixture
def run_dir(tmp_path):
    tmp_path = tmp_path / "retrack" / "seed0-x"
    tmp_path.mkdir(parents=True)
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    (tmp_path / "log.jsonl").write_text(
        "".join(json.dumps({"step": i, "time": 1.0, "train_loss": 1 / (i + 1)}) + "\n" for i in range(90))
    )
    return tmp_path


def full_report(run_dir):
    return run_report(
        run_dir,
        before=IMAGES,
        marked_before=MASK,
        after=IMAGES[::-1].copy(),
        marked_after=np.zeros(80, bool),
        mark_name="T-shirt",
        forgotten=IMAGES[:1],
        neighbors=IMAGES[None, 1:4],
        distances=np.array([[3.0, 3.25, 4.5]]),
    )


def test_run_page_is_whole_self_contained_and_safe(run_dir):
    page = Page(full_report(run_dir).read_text())
    assert "script" not in page.tags and "<script>alert(1)</script>" in page.text
    assert page.links and all(link.startswith("data:image/") for link in page.links)
    assert all(page.alts)
    for words in (
        "4 of 80 samples",
        "0 (< 0.15%)",
        "6.50",
        "+0.25",
        "no weights & no network",
        "versions.jax",
        "3.25",
        "50 unlearning steps in 9.3 s",
    ):
        assert words in page.text, words
    assert "nested" in page.text and "final" not in page.text and page.tags.count("svg") == 1
    assert {file.name for file in run_dir.iterdir()} == {"metrics.json", "log.jsonl", "samples.png", "report.html"}


def test_a_grid_shows_as_many_samples_as_the_config_says(run_dir):
    sizes = []
    for count in (8, 16):
        assert f"{count} samples" in Page(run_report(run_dir, before=IMAGES, after=IMAGES, count=count).read_text()).text
        with Image.open(run_dir / "samples.png") as picture:
            sizes.append(picture.height)
    assert sizes[0] < sizes[1]


def test_same_inputs_give_the_same_bytes(run_dir):
    first = full_report(run_dir).read_bytes(), (run_dir / "samples.png").read_bytes()
    assert first == (full_report(run_dir).read_bytes(), (run_dir / "samples.png").read_bytes())


def test_run_page_without_samples_of_before_and_curves(run_dir):
    (run_dir / "log.jsonl").unlink()
    page = Page(run_report(run_dir, after=IMAGES).read_text())
    assert "After: ReTrack" in page.text and "Before" not in page.text and "curves" not in page.text


def test_run_page_shows_how_the_model_was_pretrained(run_dir):
    log = run_dir.parent.parent / "pretrained" / "log.jsonl"
    log.parent.mkdir()
    log.write_text((run_dir / "log.jsonl").read_text())
    assert Page(run_report(run_dir).read_text()).tags.count("svg") == 2


def test_run_page_of_captions(run_dir):
    rng = np.random.default_rng(0)
    images, old, new = (rng.integers(0, 256, (2, *shape), np.uint8) for shape in ((90, 90, 3), (3, 90, 90, 3), (3, 90, 90, 3)))
    about = (("forgotten_00", "in/a.png", "a <b>red</b> circle"), ("kept_00", "c.png", ""))
    captions = [
        {"name": name, "file": file, "caption": caption, "image": images[i], "old": old[i], "new": new[i]}
        for i, (name, file, caption) in enumerate(about)
    ]
    run_report(run_dir, before=old[0], after=new[0], forgotten=images[:1], captions=captions)
    page = Page((run_dir / "report.html").read_text())
    assert "“a <b>red</b> circle” in/a.png" in page.text and "(no caption) c.png" in page.text
    assert page.text.index("Captions of forgotten images") < page.text.index("Captions of kept images")
    for when in ("before", "after"):
        assert page.alts.count(f"sample 3 {when}") == 2
    assert page.alts.count("the image c.png") == 2  # to the left of both rows
    assert not any("a grid of" in alt for alt in page.alts)  # they take the place of the grids
    assert Image.open(run_dir / "samples.png").size[0] > 300


def test_run_page_of_two_prompts(run_dir):
    photos = np.random.default_rng(1).integers(0, 256, (3, 96, 96, 3), np.uint8)
    prompts = {"original": photos, "modified": photos}
    page = Page(run_report(run_dir, before=prompts, after=prompts).read_text())
    assert "Original prompt" in page.text and "Modified prompt" in page.text
    assert sum(link.startswith("data:image/webp") for link in page.links) == 4


def test_missing_or_broken_files_are_one_line(run_dir):
    (run_dir / "metrics.json").unlink()
    with pytest.raises(UserError, match="no file .*metrics.json"):
        run_report(run_dir)


def stats(mean, std=None, runs=1):
    return {"mean": mean, "std": std, "runs": runs}


@pytest.fixture
def workdir(tmp_path):
    methods = {
        "pretrained": {"runs": 1, "metrics": {"frequency": stats(0.05), "fid": stats(6.0)}},
        "retrain": {"runs": 3, "metrics": {"frequency": stats(0.0, 0.0, 3), "fid": stats(6.2, 0.3, 3)}},
        "retrack": {
            "runs": 3,
            "metrics": {"frequency": stats(0.0, 0.0, 3), "fid": stats(6.4, 0.4, 3)},
            "unlearn_seconds": stats(9.5, 0.1, 3),
        },
        "neggrad": {"runs": 3, "metrics": {"frequency": stats(0.0, 0.0, 3), "fid": stats(212.0, 9.0, 3)}},
    }
    here = {name: {"metrics": one["metrics"], "gap_to_retrain": {}, "relearning": {}} for name, one in methods.items()}
    here["retrack"]["gap_to_retrain"] = {"fid": stats(0.2, 0.1, 3)}
    here["neggrad"]["gap_to_retrain"] = {"fid": stats(205.8, 9.0, 3)}
    summary = {"methods": methods, "targets": {"t": here}}
    summary |= {"absent": {"kid": "too few samples"}, "provenance": {"seeds": [0, 1, 2]}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "retrack" / "seed0-t").mkdir(parents=True)
    (tmp_path / "retrack" / "seed0-t" / "report.html").write_text("x")
    return tmp_path


def test_comparison_page_is_whole_and_complete(workdir):
    samples = {method: IMAGES for method in ("retrack", "pretrained", "neggrad", "retrain")}
    path = comparison_report(workdir, samples=samples, marked={"pretrained": MASK, "retrack": ~MASK}, mark_name="T-shirt")
    page = Page(path.read_text())
    assert [link for link in page.links if not link.startswith("data:image/")] == ["retrack/seed0-t/report.html"]
    assert page.tags.count("svg") == 2 and "without NegGrad" in page.text  # the plot and its close-up
    for words in (
        "6.40 ± 0.40",
        "212.00 ± 9.00",
        "+205.80",
        "+0.20 ✓",
        "too few samples",
        "0, 1, 2",
        "4 of 80 samples are the T-shirt",
        "9.5",
    ):
        assert words in page.text, words
    assert "2 methods" in page.text and page.text.index("Pretrained") < page.text.index("Retrain") < page.text.index("NegGrad")
    assert (workdir / "comparison.svg").read_text().startswith("<svg")


def test_the_verdict_shows_the_interval_of_every_target_that_any_method_was_judged_on(workdir):
    summary = json.loads((workdir / "summary.json").read_text())
    for method, target, interval in (("retrack", "label:10", [40.0, 44.0]), ("neggrad", "label:7", [51.5, 58.5])):
        found = {"inside": 0, "runs": 1, "intervals": {target: interval}, "too_few": {}, "not_remembered": []}
        summary["methods"][method]["forgotten"] = found
    (workdir / "summary.json").write_text(json.dumps(summary))
    text = Page(comparison_report(workdir).read_text()).text
    assert text.count("label:10: 40.0 to 44.0") == text.count("label:7: 51.5 to 58.5") == 1
    assert "ReTrack 0 of 1" in text and "NegGrad 0 of 1" in text


def test_too_few_retrained_models_are_told_in_place_of_counts(workdir):
    summary = json.loads((workdir / "summary.json").read_text())
    verdict = {"inside": 0, "runs": 0, "intervals": {"label:10": [40.0, 44.0]}, "too_few": {"label:10": "too few to tell: 3"}}
    verdict["not_remembered"] = []
    for entry in summary["methods"].values():
        entry["forgotten"] = None
    summary["methods"]["retrack"]["forgotten"] = verdict
    (workdir / "summary.json").write_text(json.dumps(summary))
    text = Page(comparison_report(workdir).read_text()).text
    assert "label:10: too few to tell: 3" in text and "Runs for which it does" not in text


def test_comparison_without_pictures_or_retrain(workdir):
    summary = json.loads((workdir / "summary.json").read_text())
    del summary["methods"]["retrain"]
    for entry in summary["targets"]["t"].values():
        entry["gap_to_retrain"] = {}
    (workdir / "summary.json").write_text(json.dumps(summary))
    page = Page(comparison_report(workdir).read_text())
    assert "Distance to the retrained model" not in page.text and "img" not in page.tags
    assert "2 methods on the same model, 3 runs each" in page.text  # the pretrained model is none
    assert "hollow circle" in page.text and "Star" not in page.text  # no caption speaks of a model that is absent


def test_a_frequency_of_0_has_one_form_on_every_page(workdir):
    summary = json.loads((workdir / "summary.json").read_text())
    for method in ("retrain", "retrack", "neggrad"):
        summary["methods"][method]["metrics"]["frequency"]["num_samples"] = 2000
    (workdir / "summary.json").write_text(json.dumps(summary))
    text = Page(comparison_report(workdir).read_text()).text
    assert text.count("0 (< 0.15%)") == 3 and "0.00%" not in text and "0.00 ±" not in text


def test_each_of_several_targets_has_its_own_distance_to_retrain_and_its_own_relearning(tmp_path):
    def one(method, target, seed, fid, steps, censored):
        curve = {"steps": [0, 160], "values": [fid, 2.0], "censored": censored}
        note = {"threshold": 5.0, "relearning_steps": curve}
        values = {"fid": fid, "relearning_steps": steps}
        provenance = {"metrics": {"relearning_steps": note}}
        run = {"method": method, "target": target, "seed": seed, "pretrained": {"fid": 20.0}, "unlearned": values}
        return run | {"unlearn_seconds": 1.0, "provenance": provenance}

    runs = [
        one("retrain", target, seed, base + seed, 160, True) for target, base in (("a", 130.0), ("b", 6.0)) for seed in (0, 1)
    ]
    runs += [one("retrack", target, 0, fid, 20, False) for target, fid in (("a", 60.0), ("b", 6.5))]
    text = Page(comparison_report(tmp_path, summary=summarize(runs)).read_text()).text
    for words in ("means over 2 targets", "Targets", "−70.50", "0 ✓", ">\u00a0160", "b: Fine-tuned on the remaining images"):
        assert words in text, words
    assert text.count("✓") == 2  # in the words above the tables, and at b


def test_scatter_pairs_leave_out_what_has_no_direction():
    entry = {
        "runs": 1,
        "metrics": {
            name: stats(0.5) for name in ("membership_auc", "fid", "sscd", "kid", "success_rate_original", "clip_iqa_modified")
        },
    }
    pairs = [pair for pair, _ in scatter_points({"methods": {"a": entry, "b": entry}}, most=99)]
    assert pairs[0] == ("sscd", "fid") and ("sscd", "kid") in pairs
    assert not any("membership" in name for pair in pairs for name in pair)
    assert ("success_rate_original", "clip_iqa_modified") not in pairs


def test_a_large_group_is_counted_and_its_first_images_are_shown(run_dir):
    few = run_report(run_dir, after=IMAGES, forgotten=IMAGES[:8], num_forgotten=8).read_text()
    assert "forgotten images." not in Page(few).text
    many = Page(run_report(run_dir, after=IMAGES, forgotten=IMAGES[:8], num_forgotten=1179).read_text())
    assert "The first 8 of 1,179 forgotten images." in many.text


def test_run_page_shows_what_each_model_restores(run_dir):
    before, after = (dict(forgotten=IMAGES[:1], noised=IMAGES[1:2], restored=IMAGES[k : k + 1]) for k in (2, 3))
    write_npz(run_dir.parent.parent / "pretrained" / "sscd-x.npz", **before, sscd=np.array([0.9871]))
    pictures = Page(run_report(run_dir).read_text())
    assert "What each model restores" in pictures.text and "before: SSCD 0.987" in pictures.text
    assert "after ReTrack: SSCD" not in pictures.text
    write_npz(run_dir / "sscd-x.npz", **after, sscd=np.array([0.25]))
    whole = Page(run_report(run_dir).read_text())
    assert "before: SSCD 0.987" in whole.text and "after ReTrack: SSCD 0.250" in whole.text
    assert whole.alts.count("restored after ReTrack, SSCD 0.250") == 1 and len(whole.links) == len(pictures.links) + 1
    assert "from the same noised image" in whole.text and "official_draws" not in whole.text
    write_npz(run_dir / "sscd-x.npz", **(after | {"noised": IMAGES[4:5]}), sscd=np.array([0.25]))
    apart = Page(run_report(run_dir).read_text())
    assert "each from its own noised image" in apart.text and len(apart.links) == len(whole.links) + 1
    (run_dir / "sscd-x.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="sscd-x.npz is damaged .* delete it"):
        run_report(run_dir)
