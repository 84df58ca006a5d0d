"""At which noise levels a method remembers the T-shirt, or marks it: the loss on it by eighths of the timesteps, mean over seeds.

    python -m tests.benchmarks.loss_by_timestep --workdir=runs/digits_tshirt

`--workdir` is a finished `:all` run; its exported models are read. Prints a table in Markdown. With `--alphas=0.5,0.75,1` each
method has a row for each of these points of the line from the pretrained model to its own (unlearn/calibration.py).
"""

import argparse
import itertools
from pathlib import Path

import jax
import numpy as np

from retrack_jax.checkpoints import import_diffusers, read_schedule_config
from retrack_jax.data.dataset import pixels_to_model
from retrack_jax.data.sources.digits import tshirt
from retrack_jax.diffusion import Schedule, make_eps_fn
from retrack_jax.metrics.membership import denoising_losses
from retrack_jax.unlearn.calibration import between
from retrack_jax.unlearn.methods import METHODS

PARTS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--alphas", default="1")
    options = parser.parse_args()
    workdir, eps_fn, schedule = Path(options.workdir), None, None
    alphas = [float(alpha) for alpha in options.alphas.split(",")]
    start = None if alphas == [1.0] else import_diffusers(workdir / "pretrained" / "diffusers")[1]
    image = pixels_to_model(tshirt()[None])
    edges = [1000 * part // PARTS for part in range(PARTS)]
    print("| loss on the T-shirt at t from | mean |", " | ".join(map(str, edges)), "|\n" + "| --- " * (PARTS + 2) + "|")
    for method, alpha in itertools.product(METHODS, alphas):
        losses = []
        for folder in sorted((workdir / method).glob("seed*/diffusers")):
            module, params = import_diffusers(folder)
            if eps_fn is None:  # one network and one compilation for all
                schedule = Schedule.from_config(read_schedule_config(folder))
                eps_fn = make_eps_fn(module.apply, schedule)
            params = params if alpha == 1 else between(start, params, alpha)
            losses.append(denoising_losses(eps_fn, params, schedule, image, jax.random.key(0))[0])
        if losses:
            means = [np.mean(losses), *(part.mean() for part in np.split(np.mean(losses, axis=0), PARTS))]
            name = method if alpha == 1 else f"{method}, alpha {alpha:g}"
            print(f"| {name} |", " | ".join(f"{mean:.1f}" for mean in means), "|", flush=True)


if __name__ == "__main__":
    main()
