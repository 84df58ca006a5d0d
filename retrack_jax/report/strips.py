"""Rows of pictures: a forgotten image followed by its neighbors, or by what the models restore of it."""

from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from retrack_jax.files import read_npz
from retrack_jax.report import grids

ROWS = 8  # forgotten images that a page shows


def neighbor_strips(forgotten, neighbors, distances, mark_name, num_forgotten: int | None = None) -> dict | None:
    """Returns `{"note", "rows"}`: the first forgotten images, each followed by its neighbors with their distances.

    The arguments are as in `html.run_report`. Without forgotten images there is nothing to show, and None comes back.
    """
    if forgotten is None:
        return None
    rows = []
    for row in range(min(ROWS, len(forgotten))):
        tiles = [_tile(forgotten[row], f"the {mark_name}", "forgotten", "first")]
        for k, image in enumerate(neighbors[row] if neighbors is not None else ()):
            distance = "" if distances is None else f"{float(distances[row][k]):.2f}"
            tiles.append(_tile(image, f"neighbor {k + 1}" + (f" at distance {distance}" if distance else ""), distance))
        rows.append(tiles)
    notes = []
    if neighbors is not None and neighbors.shape[1]:
        measured = ", with their distance" if distances is not None else ""
        notes.append(f"The {neighbors.shape[1]} nearest remaining images, nearest first{measured}.")
    if (count := num_forgotten or len(forgotten)) > len(rows):
        notes.append(f"The first {len(rows)} of {count:,} forgotten images.")
    return {"note": " ".join(notes), "rows": rows}


def caption_strips(captions: Sequence[Mapping]) -> list[dict]:
    """Returns `{"title", "rows"}` for the forgotten and for the kept captions; each row has a caption, its file and two strips.

    Args:
      captions: for each caption `name` (`forgotten_00`, `kept_03`), `file`, `caption`, `image` uint8 `[H, W, 3]`, and samples of
        it before and after, `old` and `new` uint8 `[n, H, W, 3]`, sample i of both from the same noise.
    """
    groups = {"forgotten": "Captions of forgotten images", "kept": "Captions of kept images"}
    strips = {kind: [] for kind in groups}
    for one in captions:
        kind = one["name"].split("_")[0]
        tiles = [
            [
                _tile(one["image"], f"the image {one['file']}", kind, "first" if kind == "forgotten" else "apart"),
                *(_tile(image, f"sample {i + 1} {when}", f"{when} {i + 1}") for i, image in enumerate(one[key])),
            ]
            for key, when in (("old", "before"), ("new", "after"))
        ]
        strips[kind].append({"caption": one["caption"], "file": one["file"], "strips": {"note": "", "rows": tiles}})
    return [{"title": title, "rows": strips[kind]} for kind, title in groups.items() if strips[kind]]


def restored_strips(run_dir, mark_name: str, label: str) -> dict | None:
    """Returns `{"note", "rows"}`: each forgotten image, noised, and restored by the model before and after; None without files.

    The pictures are those behind SSCD. Evaluation writes them as `sscd-TARGET.npz` in the folder of the run and in `pretrained/`
    of the workdir.

    Raises:
      UserError: a file is damaged.
    """
    run_dir = epath.Path(run_dir)
    name = f"sscd-{run_dir.name.partition('-')[2]}.npz"  # the folder is seed0-TARGET
    places = {"before": run_dir.parent.parent / "pretrained" / name, f"after {label}": run_dir / name}
    names, advice = ("forgotten", "noised", "restored", "sscd"), "delete it, and the report is made without it"
    models = {what: read_npz(path, names, advice=advice) for what, path in places.items() if path.exists()}
    if not models:
        return None
    first, rows = next(iter(models.values())), []
    same = all(np.array_equal(arrays["noised"], first["noised"]) for arrays in models.values())
    for row in range(min(ROWS, *(len(arrays["restored"]) for arrays in models.values()))):
        tiles = [
            _tile(first["forgotten"][row], f"the {mark_name}", "forgotten", "first"),
            *([_tile(first["noised"][row], f"the {mark_name} noised", "noised")] if same else ()),
        ]
        for what, arrays in models.items():
            if not same:
                tiles.append(_tile(arrays["noised"][row], f"the {mark_name} noised, for the model {what}", "noised"))
            score = f"SSCD {float(arrays['sscd'][row]):.3f}"
            tiles.append(_tile(arrays["restored"][row], f"restored {what}, {score}", f"{what}: {score}"))
        rows.append(tiles)
    start = "from the same noised image" if same else "each from its own noised image (config.eval.official_draws)"
    note = f"The {mark_name} with noise up to t = 250, and what the models restore of it, {start}."
    return {"note": note, "rows": rows}


def _tile(image, alt, caption, kind="") -> dict:
    photo = max(image.shape[:2]) > 64
    source = grids.data_uri(grids.resize(image[None], 64, 160)[0], photo=photo)
    return {"source": source, "alt": alt, "caption": caption, "kind": kind, "pixels": not photo}
