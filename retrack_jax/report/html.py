"""The page of one run: `report.html`, a single file that needs nothing else, and `samples.png` beside it.

It reads what the run wrote (`metrics.json`, `log.jsonl`, `samples.npz`, `sscd-TARGET.npz`) and takes the few arrays that are in
no file of the run.
"""

from collections.abc import Mapping

import numpy as np
from etils import epath

from retrack_jax.files import read_json, write_text
from retrack_jax.log import read_log
from retrack_jax.report import grids
from retrack_jax.report.catalogue import describe, method_label
from retrack_jax.report.charts import curves
from retrack_jax.report.page import details, escape, facts, figure, page, section
from retrack_jax.report.stored import first_images
from retrack_jax.report.strips import neighbor_strips, restored_strips
from retrack_jax.report.tables import before_after_rows

_SHOWN = 64  # samples in a grid where the run's config names no number
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
    neighbors=None,
    distances=None,
) -> epath.Path:
    """Writes `samples.png` and `report.html` in `run_dir` and returns the page's path.

    Args:
      run_dir: the run's folder; its `metrics.json` must be there, `log.jsonl` and the workdir's `pretrained/log.jsonl` may be.
      before: the pretrained model's samples, uint8 `[N, H, W, C]`, or a mapping of such (Stable Diffusion: `original`,
        `modified`); of all that are given, those that drew the forgotten image are shown too. None: no pictures of before.
      after: this run's samples from the same noise; by default the first ones of its `samples.npz`.
      marked_before, marked_after: bool `[N]` or a mapping of such: which samples are the forgotten image. None: unknown.
      mark_name: what those are called, such as `T-shirt`.
      forgotten: uint8 `[F, H, W, C]`, the forgotten images.
      neighbors: uint8 `[F, K, H, W, C]`, their nearest remaining images, nearest first.
      distances: float `[F, K]`, in the units of the search.

    Raises:
      UserError: `metrics.json` is missing or broken, or an array does not fit the others.
    """
    run_dir = epath.Path(run_dir)
    metrics = read_json(run_dir / "metrics.json")
    count = _grid_images(metrics)
    before, after = (_named(before), _named(after if after is not None else first_images(run_dir / "samples.npz", count)))
    masks = _named(marked_before), _named(marked_after)
    label = method_label(metrics.get("method", ""))
    title = f"{label}: {metrics.get('target', '')}, seed {metrics.get('seed', '')}"

    samples, drawn = [], []
    for name, images in after.items():
        old, old_mask, new_mask = before.get(name), masks[0].get(name), masks[1].get(name)
        samples.append(_pair(old, images, old_mask, new_mask, mark_name, label, _NAMES.get(name, name), count))
        if old is not None and old_mask is not None:
            drawn.append(_drawn_pair(old, images, old_mask, new_mask, mark_name, label))
    if after:
        _write_picture(run_dir, metrics, before, after, masks, mark_name, forgotten, neighbors, distances, count)

    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{_lead(metrics)}</p>',
        _tiles(metrics),
        section("Samples before and after", *samples),
        section(f"Where the pretrained model drew the {mark_name}", *drawn),
        section(f"The {mark_name} and its neighbors", neighbor_strips(forgotten, neighbors, distances, mark_name)),
        section(f"What each model restores of the {mark_name}", restored_strips(run_dir, mark_name, label)),
        section("All metrics", _metrics_table(metrics), absent_list((metrics.get("provenance") or {}).get("absent"))),
        section("Unlearning curves", _panels(curves(read_log(run_dir / "log.jsonl")))),
        section("Pretraining curves", _panels(curves(read_log(run_dir.parent.parent / "pretrained" / "log.jsonl")))),
        section("Provenance", provenance_table(metrics.get("provenance")), _config_details(metrics.get("config"))),
    ]
    write_text(run_dir / "report.html", page(f"{title} · retrack_jax", "\n".join(filter(None, body))))
    return run_dir / "report.html"


def _grid_images(metrics) -> int:
    """How many samples a grid shows: `config.eval.grid_images` of the run."""
    evaluation = (metrics.get("config") or {}).get("eval") or {}
    return evaluation.get("grid_images", _SHOWN)


def _named(value) -> dict:
    """An array, or a mapping of them, or None -> name -> array."""
    if value is None:
        return {}
    return dict(value) if isinstance(value, Mapping) else {"samples": value}


def _lead(metrics) -> str:
    parts = []
    if isinstance(metrics.get("config"), Mapping) and metrics["config"].get("name"):
        parts.append(f"Config <strong>{escape(metrics['config']['name'])}</strong>")
    if metrics.get("steps"):
        seconds = metrics.get("unlearn_seconds")
        parts.append(f"{metrics['steps']:,} unlearning steps" + (f" in {seconds:,.1f} s" if seconds else ""))
    return " · ".join(parts)


def _tiles(metrics) -> str:
    """The metrics that have a before and an after, the first four, as figures."""
    tiles = []
    for row in before_after_rows(metrics):
        metric = describe(row.name)
        if row.before is None or row.after is None or len(tiles) == 4:
            continue
        foot = [f"{metric.better} is better" if metric.better else "compare with retrain"]
        value, _, bound = row.after.partition(" (")
        foot += [f"below {bound.strip('< )')} at 95% confidence"] if bound else []
        foot += [f"retrained {row.retrained.partition(' (')[0]}"] if row.retrained else []
        verdict = f' class="{row.verdict}"' if row.verdict else ""
        tiles.append(
            f'<li><div class="name">{escape(metric.label)}</div>'
            f'<div class="value"><span class="from">{escape(row.before)} →</span> '
            f'<span{verdict}>{escape(value)}</span></div><div class="foot">{escape(" · ".join(foot))}</div></li>'
        )
    return f'<ul class="tiles">{"".join(tiles)}</ul>' if tiles else ""


def _pair(old, new, old_mask, new_mask, mark_name, label, prompt, count) -> str:
    parts = [f"<h3>{escape(prompt)}</h3>"] if prompt else []
    figures = [
        _grid(images[:count], None if mask is None else mask[:count], title, mark_name, None if mask is None else mask)
        for images, mask, title in ((old, old_mask, "Before: pretrained"), (new, new_mask, f"After: {label}"))
        if images is not None
    ]
    note = "<p>Tile <em>i</em> of both starts from the same noise.</p>" if old is not None else ""
    return "\n".join([*parts, note, f'<div class="pair">{"".join(figures)}</div>'])


def _drawn_pair(old, new, old_mask, new_mask, mark_name, label, most: int = 32) -> str:
    """The samples that were the forgotten image before, and what the same noise gives after; nothing where there are none."""
    count = min(len(old), len(new), len(old_mask))
    chosen = np.flatnonzero(np.asarray(old_mask[:count]))
    if not len(chosen):
        return ""
    total, chosen = len(chosen), chosen[:most]
    still = None if new_mask is None else np.asarray(new_mask)[chosen]
    before = _grid(old[chosen], np.ones(len(chosen), bool), "Before: pretrained", mark_name)
    after = _grid(new[chosen], still, f"After: {label}", mark_name)
    text = f"{total} of {count:,} samples" + (f", the first {most} shown" if total > most else "")
    return f'<p>{text}, and what the same noise gives after unlearning.</p><div class="pair">{before}{after}</div>'


def _grid(images, mask, title, mark_name, whole_mask=None) -> str:
    small = max(images.shape[1:3]) <= 64
    picture = grids.grid(images, columns=8 if small else 4, marked=mask, largest=160)
    caption = f"{len(images)} samples"
    if mask is not None:
        marked = int(np.sum(mask))
        caption += (
            f', <span class="key"></span>{marked} of them the {escape(mark_name)}'
            if marked
            else f", none of them the {escape(mark_name)}"
        )
        if whole_mask is not None and len(whole_mask) > len(images):
            caption += f"; {int(np.sum(whole_mask))} in {len(whole_mask):,}"
    alt = f"{title}: a grid of {len(images)} samples" + (
        "" if mask is None else f", {int(np.sum(mask))} outlined as the {mark_name}"
    )
    return figure(grids.data_uri(picture, photo=not small), alt, title=title, caption=caption, pixels=small)


def _metrics_table(metrics) -> str:
    rows = before_after_rows(metrics)
    gold = any(row.retrained for row in rows)
    heads = ["Metric", "Pretrained", f"After {method_label(metrics.get('method', 'unlearning'))}"] + [
        "Retrained",
        "Gap to retrained",
    ] * gold
    lines = []
    for row in rows:
        metric = describe(row.name)
        cells = [
            row.before,
            f'<span class="{row.verdict}">{escape(row.after)}</span>' if row.after and row.verdict else row.after,
        ]
        cells += [row.retrained, row.gap] if gold else []
        note = f"{metric.better.capitalize()} is better. " * bool(metric.better) + metric.meaning
        head = f'<th scope="row" class="wrap">{escape(metric.label)}<small>{escape(note)}</small></th>'
        lines.append(f"<tr>{head}{''.join(f'<td>{cell or dash()}</td>' for cell in cells)}</tr>")
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>' if lines else ""
    )


def dash() -> str:
    """Returns the cell of a value that does not exist."""
    return '<span class="soft" title="not available">–</span>'


def absent_list(absent: Mapping | None) -> str:
    """Returns why metrics are missing, as a list; nothing where none is."""
    if not absent:
        return ""
    items = "".join(
        f"<li><strong>{escape(describe(name).label)}</strong>: {escape(reason)}</li>" for name, reason in absent.items()
    )
    return f"<h3>Not computed, and why</h3><ul>{items}</ul>"


def provenance_table(provenance: Mapping | None) -> str:
    """Returns all of `provenance` but what other sections show."""
    return facts({name: value for name, value in (provenance or {}).items() if name not in ("absent", "final")})


def _config_details(config) -> str:
    return details("The whole config", config) if config else ""


def _panels(charts) -> str:
    return f'<div class="panels">{"".join(f"<figure>{chart}</figure>" for chart in charts)}</div>' if charts else ""


def _write_picture(run_dir, metrics, before, after, masks, mark_name, forgotten, neighbors, distances, count):
    """`samples.png`: the first kind of samples; without a before, after stands alone on the right of nothing."""
    name = next(iter(after))
    label = f"After: {method_label(metrics.get('method', ''))}"
    label += f", {metrics['steps']:,} steps" if metrics.get("steps") else ""
    grids.save_png(
        run_dir / "samples.png",
        grids.samples_picture(
            before.get(name),
            after[name],
            titles=("Before: pretrained", label),
            marked_before=masks[0].get(name),
            marked_after=masks[1].get(name),
            mark_name=mark_name,
            forgotten=forgotten,
            neighbors=neighbors,
            distances=distances,
            count=count,
        ),
    )
