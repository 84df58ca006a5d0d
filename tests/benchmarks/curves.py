"""Draws docs/images/sensitivity.png of docs/results/digits_sensitivity.json, which tests.benchmarks.sweeps writes.

    python -m tests.benchmarks.curves [--out=FILE]

Each panel changes one setting of the three forms; the band is the 95% prediction interval of the retrained models' losses.
"""

import argparse
import json
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "docs" / "results"
FORMS = ("ReTrack", "ReTrack, weighted", "SISS")
# Setting -> its label, and the value that is not changed (of strengths and rates all are shown as factors of it).
PANELS = {
    "strength": ("strength: lambda, or SISS's scale", None),
    "num_neighbors": ("neighbors K", 10),
    "num_steps": ("steps", 50),
    "learning_rate": ("learning rate", None),
}
OWN = {"lam": "strength", "scale": "strength"}
BASE = {"ReTrack": 0.005, "ReTrack, weighted": 0.015, "SISS": 5.0, "learning_rate": 1e-4}


def number(cell: str) -> tuple[float, float]:
    """Returns the mean and the deviation of a cell such as `26.2 ± 0.7`."""
    mean, _, spread = cell.partition(" ± ")
    return float(mean), float(spread)


def points(rows: list[list[str]], form: str, panel: str, column: int) -> list[tuple[float, float, float]]:
    """Returns (x, mean, deviation) in the order of x."""
    found = []
    if form == "SISS" and panel == "num_neighbors":
        return found
    for row in rows:
        name, _, value = row[1].partition(" ")
        if row[0] != form or (name != "nothing" and OWN.get(name, name) != panel):
            continue
        base = {"strength": BASE[form], "learning_rate": BASE["learning_rate"]}.get(panel, 1)
        x = float(value) / base if value else PANELS[panel][1] or 1.0
        found.append((x, *number(row[column])))
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/images/sensitivity.png", type=Path)
    options = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    table = json.loads((RESULTS / "digits_sensitivity.json").read_text())
    interval = json.loads((RESULTS / "digits_tshirt.json").read_text())["interval"]
    figure, axes = pyplot.subplots(2, len(PANELS), figsize=(12, 5.2), sharey="row", sharex="col", layout="constrained")
    shown_rows = ("loss on forgotten", "loss on the T-shirt", (5, 10, 20, 50, 100)), ("FID", "FID", (20, 30, 40, 60))
    for row, (column, label, y_ticks) in enumerate(shown_rows):
        for axis, (panel, (name, value)) in zip(axes[row], PANELS.items(), strict=True):
            for form, marker in zip(FORMS, "os^", strict=True):
                if shown := points(table["rows"], form, panel, table["columns"].index(column)):
                    x, means, spreads = zip(*shown, strict=True)
                    axis.errorbar(x, means, spreads, marker=marker, markersize=4, capsize=2, label=form)
            if row == 0:
                axis.axhspan(*interval, color="0.85", zorder=0, label="retrained models")
            axis.set(xscale="log", yscale="log")
            ticks = sorted({x for form in FORMS for x, _, _ in points(table["rows"], form, panel, 3)})
            axis.set_xticks(ticks, [f"{tick:g}" + ("" if value else "x") for tick in ticks])
            axis.set_yticks(y_ticks, [str(tick) for tick in y_ticks])
            axis.minorticks_off()
            if row == 1:
                axis.set_xlabel(name)
        axes[row][0].set_ylabel(label)
    axes[0][0].legend(fontsize=8)
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
