"""One setting of a digits run changed at a time: what it does to the T-shirt's loss, to FID and to the remaining images.

    python -m tests.benchmarks.sweeps NAME --workdir=runs/digits_tshirt --out=runs/NAME [--seeds=0,1,2] [--results=docs/results]

`--workdir` is a finished run of configs/digits_tshirt.py, whose pretrained model and classifier are used. Models that are there
are not trained again. Prints a table; `--results` gets it as digits_NAME.json.

    tuning        each method's learning rate, by one rule for all: on seed 100, which no report uses
    sensitivity   strength, K, steps and rate of three forms of unlearning, 500 samples a model
    copies        how often the T-shirt stands among the digits, with a model pretrained for each number
    size          how many digits are forgotten, of a model that saw no T-shirt
    forget_batch  noisy copies of the T-shirt per step, beside 64 remaining digits
"""

import itertools
import json
import shutil
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from configs.digits_tshirt import get_config
from retrack_jax.api import run
from retrack_jax.cli.process import set_up_jax, set_up_logs
from tests.benchmarks.measure import Table, parser_of

COMMAND = "python -m tests.benchmarks.sweeps {0} --workdir=runs/digits_tshirt --out=runs/{0}"
PARTS = 8  # of the schedule, over which a loss is split
TUNING_SEED, CLEAN = 100, 0.0015
FEW = {"sampling.num_images": 500, "eval.metrics": ("frequency", "fid", "forget_loss")}
# Form -> its method, and its recipe as far as it differs from the config's.
FORMS = {
    "ReTrack": ("retrack", {"unlearn.retrack.lam": 0.005}),
    "ReTrack, weighted": ("retrack", {"unlearn.retrack.snr_cap": 5.0, "unlearn.retrack.lam": 0.015}),
    "SISS": ("siss", {"unlearn.siss.scale": 5.0}),
}
STRENGTH = {"retrack": "lam", "siss": "scale"}


@dataclass(frozen=True)
class Variant:
    """A row: its cells, its method, and the fields of the config that differ; `pretrained`: of the first model too."""

    cells: tuple[str, ...]
    method: str
    changes: dict = field(default_factory=dict)
    pretrained: dict = field(default_factory=dict)

    @property
    def folder(self) -> str:
        return "-".join(self.cells).replace(", ", "-").replace(" ", "-")


def tuning() -> Iterator[Variant]:
    for method in ("retrack", "siss", "siss_no_is", "erasediff", "neggrad", "vanilla"):
        for rate in (5e-5, 1e-4, 2e-4):
            yield Variant((method, f"{rate:g}"), method, {f"unlearn.{method}.learning_rate": rate})


def sensitivity() -> Iterator[Variant]:
    factors, rate = (0.2, 5), get_config().unlearn.learning_rate
    for form, (method, own) in FORMS.items():
        yield Variant((form, "nothing"), method, FEW | own)
        name = STRENGTH[method]
        axes = {name: [own[f"unlearn.{method}.{name}"] * factor for factor in factors]}
        if method == "retrack":
            axes["num_neighbors"] = [1, 3, 30]
        axes |= {"num_steps": [10, 25, 100], "learning_rate": [rate / 4, rate * 4]}
        for axis, values in axes.items():
            for value in values:
                yield Variant((form, f"{axis} {value:g}"), method, FEW | own | {f"unlearn.{method}.{axis}": value})


def copies() -> Iterator[Variant]:
    for number, (form, (method, own)) in itertools.product((1, 3, 10, 95), FORMS.items()):
        yield Variant((form, f"{number} of {1797 + number}"), method, FEW | own, {"data.copies": number})


def size() -> Iterator[Variant]:
    digits = {"data.copies": 0, "eval.frequency_threshold": 0.0}
    few = FEW | {"eval.metrics": ("fid", "forget_loss")}
    for number, (form, (method, own)) in itertools.product((1, 3, 10, 95), FORMS.items()):
        forgotten = {"targets": (f"random:{number / 1797:.6f}",)}
        yield Variant((form, f"{number} digits"), method, few | own | forgotten, digits)


def forget_batch() -> Iterator[Variant]:
    metrics = {"eval.metrics": ("frequency", "fid", "forget_loss")}
    for number in (8, 16, 32, 64):
        yield Variant(("ReTrack", f"{number} copies a step"), "retrack", metrics | {"unlearn.forget_batch_size": number})


SWEEPS = {one.__name__: one for one in (tuning, sensitivity, copies, size, forget_batch)}


def measured(variant: Variant, folder: Path, source: Path | None, seeds: tuple[int, ...]) -> list[dict]:
    """Returns of each seed its metrics and `seconds`, `verdict`, `kept` and `by_parts`; what is done in `folder` stays.

    `kept` is by which share the remaining images' losses rose; `by_parts` `[PARTS]` is the loss on what is forgotten by parts of
    the schedule, at the verdict's draws. The pretrained model is copied from `source`, a workdir with the same data; its samples
    too, if that is another variant of the sweep.
    """
    for part in ("pretrained", "features", *["retrained"] * (variant.method == "retrain")):
        if source and (source / part).exists() and not (folder / part).exists():
            fewer = shutil.ignore_patterns("samples.*", "metrics-*") if source.parent != folder.parent else None
            shutil.copytree(source / part, folder / part, ignore=fewer)
    config = get_config(variant.method)
    config.update_from_flattened_dict(variant.pretrained | variant.changes)
    config.seeds, config.export = seeds, "none"
    run(config, folder)
    found = []
    for seed in seeds:
        (path,) = folder.glob(f"{variant.method}/seed{seed}-*")
        with np.load(folder / "pretrained" / f"losses-{path.name.partition('-')[2]}.npz") as archive:
            before, count = archive["before"].mean(axis=1), int(archive["num_remaining"])
        after = np.load(path / "losses.npz")["after"]
        whole = json.loads((path / "metrics.json").read_text())
        change = np.log(after.mean(axis=1) / before)[-count:].mean()
        parts = np.split(after[:-count].mean(axis=0), PARTS) if len(after) > count else []
        found.append(
            {
                **whole["unlearned"],
                "seconds": whole["unlearn_seconds"],
                "verdict": whole["verdict"],
                "kept": np.expm1(change),
                "by_parts": [float(part.mean()) for part in parts],
            }
        )
    return found


def mean_and_deviation(found: list[dict], name: str, form: str = ".1f") -> str:
    """Returns `mean ± deviation` of one metric over seeds, the mean alone of a single seed."""
    values = np.array([one[name] for one in found])
    return f"{values.mean():{form}}" + (f" ± {values.std(ddof=1):{form.removeprefix('+')}}" if len(values) > 1 else "")


def best_rate(values: dict[float, dict]) -> float:
    """Returns the best of `rate -> {"frequency", "fid"}` by the rule that was fixed before the first run.

    Of the rates that leave a frequency below 0.15%, else of those with the lowest frequency, it is the one with the lowest FID.
    """
    lowest = max(CLEAN, min(value["frequency"] for value in values.values()))
    good = {rate: value for rate, value in values.items() if value["frequency"] <= lowest}
    return min(good, key=lambda rate: good[rate]["fid"])


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("name", choices=SWEEPS)
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    options = parser.parse_args()
    set_up_logs()
    set_up_jax(get_config().compute.cpu_devices)
    if options.name == "tuning":
        tune(options)
        return
    seeds = tuple(int(seed) for seed in options.seeds.split(","))
    columns = "frequency", "FID", "loss on forgotten", "remaining images' loss", "seconds"
    table = Table(f"digits_{options.name}", "form", "changed", *columns)
    sources = {"{}": options.workdir}  # how a model was pretrained -> a workdir that has it
    for variant in SWEEPS[options.name]():
        folder, key = options.out / variant.folder, str(variant.pretrained)
        found = measured(variant, folder, sources.get(key), seeds)
        sources[key] = folder
        frequency = mean_and_deviation(found, "frequency", ".2%") if "frequency" in found[0] else "–"
        cells = [mean_and_deviation(found, name) for name in ("fid", "forget_loss")]
        table.add(
            *variant.cells, frequency, *cells, mean_and_deviation(found, "kept", "+.1%"), mean_and_deviation(found, "seconds")
        )
    table.write(options.results, COMMAND.format(options.name))


def tune(options: Namespace) -> None:
    """Prints each method's frequency and FID by rate, and the rate that the rule chooses."""
    values: dict[str, dict[float, dict]] = {}
    for variant in tuning():
        (found,) = measured(variant, options.out / variant.folder, options.workdir, (TUNING_SEED,))
        values.setdefault(variant.method, {})[float(variant.cells[1])] = found
    rates = list(next(iter(values.values())))
    table = Table("digits_tuning", "frequency / FID at rate", *(f"{rate:g}" for rate in rates), "chosen")
    for method, by_rate in values.items():
        cells = [f"{by_rate[rate]['frequency']:.2%} / {by_rate[rate]['fid']:.2f}" for rate in rates]
        table.add(method, *cells, f"{best_rate(by_rate):g}")
    table.write(options.results, COMMAND.format("tuning"))


if __name__ == "__main__":
    main()
