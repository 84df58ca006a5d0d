"""How loss, FID and frequency on the digits depend on strength, K, steps and rate, one changed at a time, for three forms.

    python -m tests.benchmarks.sensitivity --workdir=runs/digits_tshirt --out=runs/sensitivity [--results=docs/results]

`--workdir` is a finished digits run, whose pretrained model and classifier are used; 500 samples a model. Runs that are done are
not repeated. Writes the table digits_sensitivity to `--results` once all are.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np

from configs.digits_tshirt import get_config
from retrack_jax.api import run
from retrack_jax.cli.process import set_up_jax, set_up_logs
from tests.benchmarks.measure import Table

# Form -> its method, and its recipe as far as it differs from the config's.
FORMS = {
    "ReTrack": ("retrack", {"lam": 0.005}),
    "ReTrack, weighted": ("retrack", {"snr_cap": 5.0, "lam": 0.015}),
    "SISS": ("siss", {"scale": 5.0}),
}
STRENGTH = {"retrack": "lam", "siss": "scale"}
# Field -> its values: factors of the form's own strength and rate, others as they are. A form without the field is left out.
AXES = {"strength": (0.2, 1, 5), "num_neighbors": (1, 3, 10, 30), "num_steps": (10, 25, 50, 100), "learning_rate": (0.25, 1, 4)}
METRICS = ("frequency", "fid", "forget_loss")


def configured(form: str, axis: str, value: float):
    """Returns the config of `form` with `axis` at `value`, and the value as the table shows it; None if it has no such field."""
    method, own = FORMS[form]
    if axis == "num_neighbors" and method != "retrack":
        return None
    config = get_config(method)
    config.unlearn[method].update(own)
    name = STRENGTH[method] if axis == "strength" else axis
    if axis in ("strength", "learning_rate"):
        value *= config.unlearn[method][name] or config.unlearn[name]
    config.unlearn[method][name] = value
    config.sampling.num_images, config.eval.metrics = 500, METRICS
    return config, f"{name} {value:g}"


def measured(config, folder: Path, source: Path, seeds: tuple[int, ...]) -> np.ndarray:
    """Returns of each seed the values of `METRICS`, and by which share the remaining images' losses rose."""
    for part in ("pretrained", "features"):
        if (source / part).exists() and not (folder / part).exists():
            fewer = shutil.ignore_patterns("samples.*", "metrics-*") if source.parent != folder.parent else None
            shutil.copytree(source / part, folder / part, ignore=fewer)
    config.seeds = seeds
    run(config, folder)
    with np.load(next((folder / "pretrained").glob("losses-*.npz"))) as archive:
        before, count = archive["before"].mean(axis=1), int(archive["num_remaining"])
    found = []
    for seed in seeds:
        (path,) = folder.glob(f"{config.method}/seed{seed}-*")
        values = json.loads((path / "metrics.json").read_text())["unlearned"]
        after = np.load(path / "losses.npz")["after"].mean(axis=1)
        change = np.log(after / before)[-count:].mean()
        found.append([*(values[name] for name in METRICS), np.expm1(change)])
    return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    seeds = tuple(int(seed) for seed in options.seeds.split(","))
    set_up_logs()
    set_up_jax(get_config().compute.cpu_devices)
    columns = "frequency", "FID", "loss on the T-shirt", "remaining images' loss"
    table, source = Table("digits_sensitivity", "form", "changed", *columns), options.workdir
    for axis, values in AXES.items():
        for form in FORMS:
            for value in values:
                chosen = configured(form, axis, value)
                if chosen is None:
                    continue
                config, shown = chosen
                folder = options.out / f"{form}-{shown}".replace(", ", "-").replace(" ", "-")
                rows = measured(config, folder, source, seeds)
                source = folder
                (frequency, fid, loss, kept), (_, fids, losses, kepts) = rows.mean(axis=0), rows.std(axis=0)
                cells = f"{frequency:.2%}", f"{fid:.1f} ± {fids:.1f}", f"{loss:.1f} ± {losses:.1f}", f"{kept:+.1%} ± {kepts:.1%}"
                table.add(form, shown, *cells)
    if options.results:
        command = "python -m tests.benchmarks.sensitivity --workdir=runs/digits_tshirt --out=runs/sensitivity"
        table.write(options.results, command, "two cores of an Intel Xeon")


if __name__ == "__main__":
    main()
