"""Writes what the runs of configs/mnist5k_tshirt.py measured to docs/results/mnist5k.json; `make docs` makes the table of it.

    python -m tests.benchmarks.mnist_results --workdir=runs/mnist5k --machine="two cores of ..." [--also "NAME=DIR" ...]

Reads every finished run of the workdir, and of ReTrack in other workdirs: each is a row NAME after ReTrack's. `shares` says which
digits the samples are, in percent of those that are no T-shirt, as the classifier behind FID sees them.
"""

import argparse
import json
from datetime import date
from pathlib import Path

import numpy as np

from retrack_jax.data.sources.mnist5k import tshirt
from retrack_jax.evaluate.aggregate import summarize
from retrack_jax.files import read_json, read_npz
from retrack_jax.metrics.features.digit_net import load_digit_net
from retrack_jax.metrics.frequency import target_distances
from retrack_jax.report.tables import comparison_text
from retrack_jax.unlearn.methods import METHODS

OUT = Path(__file__).parents[2] / "docs" / "results" / "mnist5k.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--machine", required=True)
    parser.add_argument(
        "--command", default="python -m retrack_jax.main --config=configs/mnist5k_tshirt.py:METHOD --config.seeds=SEED"
    )
    parser.add_argument("--also", action="append", default=[], metavar="NAME=DIR")
    options = parser.parse_args()
    paths = [
        path for method in ("pretrained", *METHODS) for path in sorted((options.workdir / method).glob("seed*/metrics.json"))
    ]
    runs = [read_json(path) for path in paths]
    columns, rows = _table(runs)
    after = 1 + next(place for place, row in enumerate(rows) if row[0] == "ReTrack")
    others = {}
    for one in options.also:
        name, _, folder = one.partition("=")
        others[name] = sorted(Path(folder).glob("retrack/seed*/metrics.json"))
        (row,) = [row for row in _table([read_json(path) for path in others[name]])[1] if row[0] == "ReTrack"]
        rows.insert(after, [name, *row[1:]])
        after += 1
    first = runs[0]
    results = {
        "command": options.command,
        "version": first["provenance"]["versions"]["retrack_jax"],
        "machine": options.machine,
        "date": date.today().isoformat(),
        "pretraining_steps": first["config"]["pretrain"]["num_steps"],
        "columns": columns,
        "rows": rows,
        "pretrained": {"num_samples": _samples(options.workdir / "pretrained"), **first["pretrained"]},
        "runs": [_run(path, run) for path, run in zip(paths, runs, strict=True) if run["method"] != "pretrained"],
        "others": {name: [_run(path, read_json(path)) for path in found] for name, found in others.items()},
        "shares": {
            str(folder.relative_to(options.workdir)): _shares(options.workdir, folder) for folder in _folders(options, paths)
        },
    }
    OUT.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def _table(runs: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Returns the columns and the rows of the comparison of `runs`."""
    lines = [line.strip("|").split("|") for line in comparison_text(summarize(runs), markdown=True).splitlines()]
    columns, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return columns, rows


def _folders(options, paths: list[Path]) -> list[Path]:
    return [options.workdir / "pretrained", *(path.parent for path in paths if path.parents[1].name != "pretrained")]


def _samples(folder: Path) -> int:
    return len(read_npz(folder / "samples.npz")["samples"])


def _run(path: Path, run: dict) -> dict:
    kept = {name: run[name] for name in ("method", "seed", "steps", "unlearn_seconds", "unlearned", "verdict")}
    return {**kept, "num_samples": _samples(path.parent)}


def _shares(workdir: Path, folder: Path) -> list[float]:
    """The share of each digit, 0 to 9, in percent."""
    samples = read_npz(folder / "samples.npz")["samples"]
    digits = samples[target_distances(samples, tshirt()[None]) >= 10]
    labels = load_digit_net(workdir / "features" / "digit_net.npz")(digits)["logits"].argmax(axis=1)
    return [round(100 * float(share), 1) for share in np.bincount(labels, minlength=10) / len(labels)]


if __name__ == "__main__":
    main()
