"""How near each method of a finished run lands to models retrained without the T-shirt, and how near these are to each other.

    python -m tests.benchmarks.gap_to_retrain --workdir=runs/digits_tshirt --out=runs/gap.json [--also "NAME=DIR" ...]
        [--results=docs/results]

`--workdir` is a finished run of `configs/digits_tshirt.py` with two retrained seeds or more; `--also` names a workdir of ReTrack
with other options. Of each method and seed, against the retrained model of the next seed:

    loss         on the T-shirt, mean over 256 noises, and by eighths of the timesteps
    J            the two-sided gap of gap.py over `--images` samples of each, and its standard error
    apart        ||eps_u - eps_r||^2 by eighths, on 64 remaining digits and on the T-shirt

`--results` gets the means over seeds, as digits_loss_by_timestep.json and, as multiples of what is between two retrained models,
digits_gap.json. The latter leaves out pairs with the retrained model of the least seed, but for those of two retrained models: it
started from the weights that the pretrained model started from, and is nearer to whatever comes from that.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from configs.digits_tshirt import get_config
from retrack_jax.checkpoints import import_diffusers, read_schedule_config
from retrack_jax.cli.process import set_up_jax
from retrack_jax.data.dataset import pixels_to_model
from retrack_jax.data.sources.digits import digits, tshirt
from retrack_jax.diffusion import Schedule, make_eps_fn
from retrack_jax.metrics.membership import denoising_losses, prediction_interval
from retrack_jax.report.catalogue import method_label
from retrack_jax.train.run_store import RunStore
from retrack_jax.unlearn.methods import METHODS
from tests.benchmarks.gap import prediction_distances, two_sided_gap
from tests.benchmarks.measure import Table, parser_of

PARTS = 8
NOISES = {"T-shirt": 256, "remaining": 64}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--also", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--images", type=int, default=64)
    options = parser.parse_args()
    set_up_jax(get_config().compute.cpu_devices)
    also = {name: Path(folder) for name, _, folder in (one.rpartition("=") for one in options.also)}
    rows = measure(options.workdir, also, options.images)
    options.out.write_text(json.dumps(rows, indent=1))
    for table in tables(rows):
        table.write(options.results, "python -m tests.benchmarks.gap_to_retrain --workdir=runs/digits_tshirt --out=runs/gap.json")


def measure(workdir: Path, also: dict[str, Path], num_images: int) -> dict:
    """Returns row -> one dict a seed, and under `interval` the 95% prediction interval of the retrained models' losses."""
    folders = {name: seeds(workdir / name) for name in ("retrain", *METHODS)} | {
        name: seeds(folder / "retrack") for name, folder in also.items()
    }
    retrained = {seed: load(folder) for seed, folder in folders["retrain"].items()}
    first = folders["retrain"][min(retrained)] / "diffusers"
    module, like = import_diffusers(first)
    schedule = Schedule.from_config(read_schedule_config(first))
    eps_fn, rng = make_eps_fn(module.apply, schedule), jax.random.key(0)
    pictures = {
        "T-shirt": pixels_to_model(tshirt()[None]),
        "remaining": pixels_to_model(digits()[0][np.random.default_rng(0).permutation(1797)[:64]]),
    }

    def row(params, samples, seed: int) -> dict:
        partner = next((one for one in sorted(retrained) if one > seed), min(retrained))
        other, others = retrained[partner]
        losses = denoising_losses(eps_fn, params, schedule, pictures["T-shirt"], rng)[0]
        found = {"seed": seed, "partner": partner, "loss": float(losses.mean())}
        found["by_eighths"] = [float(part.mean()) for part in np.split(losses, PARTS)]
        both = samples[:num_images], others[:num_images]
        found["J"], found["J_error"] = two_sided_gap(eps_fn, params, other, schedule, *both, rng, num_noises=64)
        given = eps_fn, params, other, schedule
        found["apart"] = {
            name: prediction_distances(*given, images, rng, num_noises=NOISES[name], parts=PARTS).tolist()
            for name, images in pictures.items()
        }
        return found

    with RunStore(workdir / "pretrained" / "checkpoints") as store:
        tree, _ = store.restore(lambda step: {"step": np.zeros((), np.int32), "params": like})
    before = tree["params"], samples_of(workdir / "pretrained")
    found = {"pretrained": [row(*before, seed) for seed in sorted(retrained)]}
    found |= {name: [row(*load(folder), seed) for seed, folder in runs.items()] for name, runs in folders.items() if runs}
    return found | {"interval": prediction_interval([one["loss"] for one in found["retrain"]])}


def tables(found: dict) -> Iterator[Table]:
    """Yields the two tables of the docs, of the means over seeds."""
    rows = {name: runs for name, runs in found.items() if name != "interval"}
    starts = [f"{1000 * part // PARTS}" for part in range(PARTS)]
    by_timestep = Table("digits_loss_by_timestep", "loss on the T-shirt at t from", "mean", *starts)
    for name, runs in rows.items():
        eighths = np.mean([one["by_eighths"] for one in runs], axis=0)
        by_timestep.add(method_label(name), f"{eighths.mean():.1f}", *(f"{value:.1f}" for value in eighths))
    yield by_timestep
    gap = Table("digits_gap", "model", "J", "J, times", "apart on the T-shirt, times", "apart on digits, times")
    J, apart = mean_gap(found["retrain"])
    least = min(one["seed"] for one in found["retrain"])
    for name, runs in rows.items():
        if name != "retrain":
            runs = [one for one in runs if one["partner"] != least]
        own_J, own_apart = mean_gap(runs)
        spread = np.std([one["J"] for one in runs], ddof=1)
        times = [f"{own_apart[place] / apart[place]:.2f}" for place in NOISES]
        gap.add(method_label(name), f"{own_J:.3f} ± {spread:.3f}", f"{own_J / J:.2f}", *times)
    yield gap


def mean_gap(runs: list[dict]) -> tuple[float, dict[str, float]]:
    """Returns J, and of each kind of picture the distance of the predictions over all eighths; means over seeds."""
    apart = {name: float(np.mean([one["apart"][name] for one in runs])) for name in NOISES}
    return float(np.mean([one["J"] for one in runs])), apart


def seeds(folder: Path) -> dict[int, Path]:
    """Returns seed -> the folder of each run of one method that exported its model."""
    runs = {int(path.name[4:].partition("-")[0]): path for path in folder.glob("seed*-*") if (path / "diffusers").exists()}
    return dict(sorted(runs.items()))


def load(run: Path) -> tuple:
    """Returns a run's exported parameters, and its samples in [-1, 1]."""
    return import_diffusers(run / "diffusers")[1], samples_of(run)


def samples_of(folder: Path) -> np.ndarray:
    with np.load(folder / "samples.npz") as arrays:
        return 2 * arrays["samples_float"] - 1


if __name__ == "__main__":
    main()
