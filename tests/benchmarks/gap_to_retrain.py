"""How near each method of a finished run lands to models retrained without the T-shirt, and how near these are to each other.

    python -m tests.benchmarks.gap_to_retrain --workdir=runs/digits_tshirt --out=runs/gap.json

`--workdir` is a finished run of `configs/digits_tshirt.py` with two retrained seeds or more. Of each method and seed, against
the retrained model of the next seed (with a single one, its own row is 0 and there is no interval):

    loss         on the T-shirt, mean over 256 noises, and by eighths of the timesteps
    J            the two-sided gap of metrics/gap.py over `--images` samples of each, and its standard error
    apart        ||eps_u - eps_r||^2 by eighths, on 64 remaining digits and on the T-shirt, over the same between retrained seeds
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np

from retrack_jax.checkpoints import import_diffusers, read_schedule_config
from retrack_jax.checkpoints.run_store import RunStore
from retrack_jax.data.dataset import pixels_to_model
from retrack_jax.data.sources.digits import digits, tshirt
from retrack_jax.diffusion import Schedule, make_eps_fn
from retrack_jax.metrics.gap import prediction_distances, two_sided_gap
from retrack_jax.metrics.membership import denoising_losses, prediction_interval

PARTS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--images", type=int, default=256)
    options = parser.parse_args()
    table = measure(Path(options.workdir), options.images)
    Path(options.out).write_text(json.dumps(table, indent=1))


def measure(workdir: Path, num_images: int) -> dict:
    """Returns method -> one dict a seed, and under `interval` the 95% prediction interval of the retrained models' losses."""
    paths = sorted((workdir / "retrain").glob("seed*/diffusers"))
    module, like = import_diffusers(paths[0])
    schedule = Schedule.from_config(read_schedule_config(paths[0]))
    eps_fn = make_eps_fn(module.apply, schedule)
    rng, shirt = jax.random.key(0), pixels_to_model(tshirt()[None])
    remaining = pixels_to_model(digits()[0][np.random.default_rng(0).permutation(1797)[:64]])
    retrained = {int(path.parent.name[4:].split("-")[0]): load(path.parent) for path in paths}

    def apart(params, other) -> dict:
        images = {"remaining": remaining, "T-shirt": shirt}
        noises = {"remaining": 64, "T-shirt": 256}
        return {
            name: prediction_distances(eps_fn, params, other, schedule, images[name], rng, num_noises=noises[name], parts=PARTS)
            for name in images
        }

    def row(params, samples, seed: int) -> dict:
        seeds = sorted(retrained)
        partner = next((one for one in seeds if one > seed), seeds[0])
        other, others = retrained[partner]
        losses = denoising_losses(eps_fn, params, schedule, shirt, rng)[0]
        found = {"seed": seed, "partner": partner, "loss": float(losses.mean())}
        found["by_eighths"] = [float(part.mean()) for part in np.split(losses, PARTS)]
        found["apart"] = {name: list(map(float, values)) for name, values in apart(params, other).items()}
        if samples is not None and others is not None:
            both = samples[:num_images], others[:num_images]
            found["J"], found["J_error"] = two_sided_gap(eps_fn, params, other, schedule, *both, rng, num_noises=64)
        return found

    table: dict = {"retrain": [row(*retrained[seed], seed) for seed in sorted(retrained)]}
    with RunStore(workdir / "pretrained" / "checkpoints") as store:
        tree, _ = store.restore(lambda step: {"step": np.zeros((), np.int32), "params": like})
    table["pretrained"] = [row(tree["params"], samples_of(workdir / "pretrained"), seed) for seed in sorted(retrained)]
    for method in sorted(path.name for path in workdir.iterdir() if path.name not in ("retrain", "retrained", "pretrained")):
        runs = sorted((workdir / method).glob("seed*-*"))
        rows = [row(*load(run), int(run.name[4:].split("-")[0])) for run in runs if (run / "diffusers").exists()]
        if rows:
            table[method] = rows
    if len(retrained) > 1:
        table["interval"] = prediction_interval([one["loss"] for one in table["retrain"]])
    return table


def load(run: Path) -> tuple:
    """Returns a run's exported parameters, and its samples in [-1, 1] or None."""
    return import_diffusers(run / "diffusers")[1], samples_of(run)


def samples_of(folder: Path) -> np.ndarray | None:
    if not (folder / "samples.npz").exists():
        return None
    with np.load(folder / "samples.npz") as arrays:
        return 2 * arrays["samples_float"] - 1


if __name__ == "__main__":
    main()
