"""Chooses each method's learning rate on the digits with one budget for all: the same grid, on seed 100, which no report uses.

    python -m tests.benchmarks.tune_methods --workdir=runs/digits_tshirt --out=runs/tuning

The rule, fixed before the first run: of the rates that leave a frequency below 0.15% (else of those with the lowest frequency),
the one with the lowest FID. `--workdir` is a finished digits run, whose pretrained model and samples are used.
"""

import argparse
import json
import shutil
from pathlib import Path

from configs.digits_tshirt import get_config
from retrack_jax.api import run
from retrack_jax.cli.process import set_up_jax, set_up_logs

RATES = (5e-5, 1e-4, 2e-4)
METHODS = ("retrack", "siss", "siss_no_is", "erasediff", "neggrad", "vanilla")
SEED, CLEAN = 100, 0.0015


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    set_up_logs()
    set_up_jax(get_config().compute.cpu_devices)
    table = {}
    for method in METHODS:
        for rate in RATES:
            folder = Path(options.out) / f"{method}-{rate:g}"
            if not (folder / "pretrained").exists():
                shutil.copytree(Path(options.workdir) / "pretrained", folder / "pretrained")
                shutil.copytree(Path(options.workdir) / "features", folder / "features")
            config = get_config(method)
            config.seeds = (SEED,)
            config.unlearn[method].learning_rate = rate
            summary = run(config, folder)
            metrics = summary["methods"][method]["metrics"]
            table[f"{method} {rate:g}"] = {name: metrics[name]["mean"] for name in ("frequency", "fid")}
            (Path(options.out) / "tuning.json").write_text(json.dumps({"grid": table, "chosen": choose(table)}, indent=2))


def choose(table: dict) -> dict:
    """Returns method -> learning rate by the rule above."""
    chosen = {}
    for method in METHODS:
        mine = {float(key.split()[1]): value for key, value in table.items() if key.split()[0] == method}
        if mine:
            chosen[method] = best_rate(mine)
    return chosen


def best_rate(values: dict[float, dict]) -> float:
    """Returns the rate that the rule above chooses of `rate -> {"frequency", "fid"}`."""
    lowest = max(CLEAN, min(value["frequency"] for value in values.values()))
    good = {rate: value for rate, value in values.items() if value["frequency"] <= lowest}
    return min(good, key=lambda rate: good[rate]["fid"])


if __name__ == "__main__":
    main()
