"""Rows of pictures: a forgotten image followed by its neighbors, or by what the models restore of it."""

import numpy as np
from etils import epath

from retrack_jax.files import read_npz
from retrack_jax.report import grids
from retrack_jax.report.page import escape

ROWS = 8  # forgotten images that a page shows


def neighbor_strips(forgotten, neighbors, distances, mark_name, rows: int = ROWS) -> str:
    """Returns the forgotten images, each followed by its neighbors and their distances, as HTML lists."""
    if forgotten is None:
        return ""
    parts = []
    for row in range(min(rows, len(forgotten))):
        items = [_tile(forgotten[row], f"the {mark_name}", "forgotten", "first")]
        for k, image in enumerate(neighbors[row] if neighbors is not None else ()):
            distance = "" if distances is None else f"{float(distances[row][k]):.2f}"
            items.append(_tile(image, f"neighbor {k + 1}" + (f" at distance {distance}" if distance else ""), distance))
        parts.append(_strip(items))
    count = 0 if neighbors is None else neighbors.shape[1]
    note = (
        f"The {count} nearest remaining images, nearest first" + (", with their distance." if distances is not None else ".")
        if count
        else ""
    )
    more = f" The first {rows} of {len(forgotten)} forgotten images." if len(forgotten) > rows else ""
    return (f"<p>{note}{more}</p>" if note or more else "") + "".join(parts)


def restored_strips(run_dir, mark_name: str, label: str) -> str:
    """Returns the pictures behind SSCD as HTML lists: each forgotten image, noised, and restored by the model before and after.

    They are in `sscd-TARGET.npz` of the run's folder and of the workdir's `pretrained/`, which evaluation writes; nothing is
    returned where neither is there.

    Raises:
      UserError: a file is damaged.
    """
    run_dir = epath.Path(run_dir)
    name = f"sscd-{run_dir.name.partition('-')[2]}.npz"  # the folder is seed0-TARGET
    places = {"before": run_dir.parent.parent / "pretrained" / name, f"after {label}": run_dir / name}
    models = {what: arrays for what, path in places.items() if (arrays := _read(path)) is not None}
    if not models:
        return ""
    given = next(iter(models.values()))
    parts = []
    for row in range(min(ROWS, *(len(arrays["restored"]) for arrays in models.values()))):
        items = [
            _tile(given["forgotten"][row], f"the {mark_name}", "forgotten", "first"),
            _tile(given["noised"][row], f"the {mark_name} noised", "noised"),
        ]
        for what, arrays in models.items():
            score = f"SSCD {float(arrays['sscd'][row]):.3f}"
            items.append(_tile(arrays["restored"][row], f"restored {what}, {score}", f"{what}: {score}"))
        parts.append(_strip(items))
    note = f"The {mark_name} noised to t = 250 and denoised by each model from there, with the same noise."
    return f"<p>{escape(note)}</p>" + "".join(parts)


def _read(path) -> dict[str, np.ndarray] | None:
    if not path.exists():
        return None
    names = ("forgotten", "noised", "restored", "sscd")
    return read_npz(path, names, advice="delete it, and the report is made without it")


def _strip(items: list[str]) -> str:
    return f'<ul class="strip">{"".join(items)}</ul>'


def _tile(image, alt, caption, kind="") -> str:
    tile = grids.resize(image[None], 64, 160)[0]
    photo = max(image.shape[:2]) > 64
    css = "" if photo else ' class="pixels"'
    source = grids.data_uri(tile, photo=photo)
    return f'<li class="{kind}"><img{css} src="{source}" alt="{escape(alt)}">{escape(caption)}</li>'
