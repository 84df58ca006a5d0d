"""The page of one run: `report.html`, a single file that needs nothing else, and `samples.png` next to it.

It reads what the run wrote (`metrics.json`, `log.jsonl`, `sscd-TARGET.npz`) and takes the arrays that it shows.
"""

import json
from collections.abc import Mapping

import numpy as np
from etils import epath

from retrack_jax.files import read_json, write_text
from retrack_jax.log import read_log
from retrack_jax.report import grids
from retrack_jax.report.catalogue import describe, method_label
from retrack_jax.report.charts import curves
from retrack_jax.report.page import render
from retrack_jax.report.strips import caption_strips, neighbor_strips, restored_strips
from retrack_jax.report.tables import absent_reasons, before_after_rows, label_rows, provenance_rows
from retrack_jax.report.verdict import box, calibration_in_words, file_rows

_DRAWN = 32  # of the samples that were the forgotten image
_NAMES = {"samples": "", "original": "Original prompt", "modified": "Modified prompt"}


def run_report(
    run_dir,
    *,
    before=None,
    after=None,
    marked_before=None,
    marked_after=None,
    mark_name="forgotten image",
    forgotten=None,
    num_forgotten=None,
    neighbors=None,
    distances=None,
    captions=None,
    labels=None,
    count=64,
) -> epath.Path:
    """Writes `samples.png` and `report.html` in `run_dir` and returns the page's path.

    Args:
      run_dir: the run's folder; it must hold `metrics.json`; `log.jsonl` and the workdir's `pretrained/log.jsonl` are optional.
      before: the pretrained model's samples, uint8 `[N, H, W, C]`, or a mapping of such (Stable Diffusion: `original`,
        `modified`); those among them that are the forgotten image are shown too. None: no pictures of before.
      after: this run's samples from the same noise; None: no pictures of samples.
      marked_before, marked_after: bool `[N]` or a mapping of such: which samples are the forgotten image. None: unknown.
      mark_name: what those are called, such as `T-shirt`.
      forgotten: uint8 `[F, H, W, C]`, the first forgotten images; num_forgotten: how many there are, None: F.
      neighbors: uint8 `[F, K, H, W, C]`, their nearest remaining images, nearest first.
      distances: float `[F, K]`, in the units of the search.
      captions: of captioned images, what `strips.caption_strips` takes; they are shown in place of the grids of samples.
      labels: int `[N]`, under which the samples of both models were drawn, if the network takes any.
      count: how many samples of each model are shown.

    Raises:
      UserError: `metrics.json` is missing or broken, or an array does not fit the others.
    """
    run_dir = epath.Path(run_dir)
    metrics = read_json(run_dir / "metrics.json")
    config = metrics.get("config") or {}
    before, after, *masks = map(_named, (before, after, marked_before, marked_after))
    label = method_label(metrics.get("method", ""))
    titles = ("Before: pretrained", f"After: {label}")

    samples, drawn = [], []
    for name, images in after.items() if captions is None else ():
        old, old_mask, new_mask = before.get(name), masks[0].get(name), masks[1].get(name)
        both = [
            _grid(title, images, mask, mark_name, count)
            for title, images, mask in zip(titles, (old, images), (old_mask, new_mask), strict=True)
            if images is not None
        ]
        samples.append({"prompt": _NAMES.get(name, name), "pictures": both})
        if old is not None and old_mask is not None and np.any(old_mask):
            drawn.append(_drawn_pair(old, images, old_mask, new_mask, mark_name, titles))
    if after:  # the picture shows the first kind of samples
        name, steps = next(iter(after)), f", {metrics['steps']:,} steps" if metrics.get("steps") else ""
        picture = grids.samples_picture(
            before.get(name),
            after[name],
            titles=(titles[0], titles[1] + steps),
            marked_before=masks[0].get(name),
            marked_after=masks[1].get(name),
            mark_name=mark_name,
            forgotten=forgotten,
            num_forgotten=num_forgotten,
            neighbors=neighbors,
            distances=distances,
            count=count,
        )
        grids.save_png(run_dir / "samples.png", picture)

    rows = before_after_rows(metrics)
    heads = ["Metric", "Pretrained", f"After {label or 'unlearning'}"]
    retrained = any(row.retrained for row in rows)
    text = render(
        "run.html",
        title=f"{label}: {metrics.get('target', '')}, seed {metrics.get('seed', '')}",
        config_name=config.get("name"),
        work=_work(metrics),
        verdict=box(metrics.get("verdict")),
        files=file_rows(metrics.get("verdict")),
        note=(metrics.get("provenance") or {}).get("note"),
        calibration=calibration_in_words(found) if (found := metrics.get("calibration")) else "",
        by_label=label_rows(labels, marked_before, marked_after),
        tiles=_tiles(rows),
        samples=samples,
        captions=caption_strips(captions or ()),
        drawn=drawn,
        mark_name=mark_name,
        neighbors=neighbor_strips(forgotten, neighbors, distances, mark_name, num_forgotten),
        restored=restored_strips(run_dir, mark_name, label),
        heads=heads + ["Retrained", "Gap to retrained"] * retrained,
        retrained=retrained,
        rows=[(row, describe(row.name)) for row in rows],
        absent=absent_reasons(metrics.get("provenance")),
        unlearning=curves(read_log(run_dir / "log.jsonl")),
        pretraining=curves(read_log(run_dir.parent.parent / "pretrained" / "log.jsonl")),
        provenance=provenance_rows(metrics.get("provenance")),
        config=json.dumps(config, indent=2, default=str) if config else "",
    )
    write_text(run_dir / "report.html", text)
    return run_dir / "report.html"


def _named(value) -> dict:
    """An array, or a mapping of them, or None -> name -> array."""
    if value is None:
        return {}
    return dict(value) if isinstance(value, Mapping) else {"samples": value}


def _work(metrics) -> str:
    if not metrics.get("steps"):
        return ""
    seconds = metrics.get("unlearn_seconds")
    kind = "training" if metrics.get("method") == "retrain" else "unlearning"
    return f"{metrics['steps']:,} {kind} steps" + (f" in {seconds:,.1f} s" if seconds else "")


def _tiles(rows) -> list[dict]:
    """The first four metrics that have a value before and after."""
    tiles = []
    for row in [row for row in rows if row.before is not None and row.after is not None][:4]:
        metric = describe(row.name)
        foot = [f"{metric.better} is better" if metric.better else "compare with retrain"]
        foot += [f"retrained {row.retrained}"] if row.retrained else []
        tiles.append({"label": metric.label, "row": row, "foot": " · ".join(foot)})
    return tiles


def _drawn_pair(old, new, old_mask, new_mask, mark_name, titles) -> dict:
    """The samples that were the forgotten image before unlearning, and what the same noise gives after it."""
    count = min(len(old), len(new), len(old_mask))
    chosen = np.flatnonzero(np.asarray(old_mask[:count]))
    note = f"{len(chosen)} of {count:,} samples" + (f", the first {_DRAWN} shown" if len(chosen) > _DRAWN else "")
    chosen = chosen[:_DRAWN]
    still = None if new_mask is None else np.asarray(new_mask)[chosen]
    pictures = [
        _grid(titles[0], old[chosen], np.ones(len(chosen), bool), mark_name, _DRAWN),
        _grid(titles[1], new[chosen], still, mark_name, _DRAWN),
    ]
    return {"note": f"{note}, and what the same noise gives after unlearning.", "pictures": pictures}


def _grid(title, images, mask, mark_name, count) -> dict:
    """A picture of the first `count` images, with how many of them, and of all, are the forgotten image."""
    shown, marked = images[:count], None if mask is None else np.asarray(mask)[:count]
    caption, alt = f"{len(shown)} samples", f"{title}: a grid of {len(shown)} samples"
    if marked is not None:
        number = int(marked.sum())
        caption += f", {number or 'none'} of them the {mark_name}"
        caption += f"; {int(np.sum(mask))} in {len(mask):,}" if len(mask) > len(shown) else ""
        alt += f", {number} outlined as the {mark_name}"
    photo = max(images.shape[1:3]) > 64
    picture = grids.grid(shown, columns=4 if photo else 8, marked=marked, largest=160)
    source = grids.data_uri(picture, photo=photo)
    outlined = marked is not None and marked.any()
    return {"title": title, "source": source, "alt": alt, "caption": caption, "marked": outlined, "pixels": not photo}
