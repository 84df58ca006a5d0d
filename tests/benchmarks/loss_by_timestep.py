"""At which noise levels a method remembers the T-shirt, or marks it: the loss on it by eighths of the timesteps, mean over seeds.

    python -m tests.benchmarks.loss_by_timestep --workdir=runs/digits_tshirt

`--workdir` is a finished `:all` run; its exported models are read. Prints a table in Markdown.
"""

import argparse
from pathlib import Path

import jax
import numpy as np

from retrack_jax.checkpoints import import_diffusers, read_schedule_config
from retrack_jax.data.dataset import pixels_to_model
from retrack_jax.data.sources.digits import tshirt
from retrack_jax.diffusion import Schedule, make_eps_fn
from retrack_jax.metrics.membership import denoising_losses
from retrack_jax.unlearn.methods import METHODS

PARTS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    workdir, eps_fn, schedule = Path(parser.parse_args().workdir), None, None
    image = pixels_to_model(tshirt()[None])
    edges = [1000 * part // PARTS for part in range(PARTS)]
    print("| loss on the T-shirt at t from |", " | ".join(map(str, edges)), "|\n" + "| --- " * (PARTS + 1) + "|")
    for method in METHODS:
        losses = []
        for folder in sorted((workdir / method).glob("seed*/diffusers")):
            module, params = import_diffusers(folder)
            if eps_fn is None:  # one network and one compilation for all
                schedule = Schedule.from_config(read_schedule_config(folder))
                eps_fn = make_eps_fn(module.apply, schedule)
            losses.append(denoising_losses(eps_fn, params, schedule, image, jax.random.key(0))[0])
        if losses:
            means = [part.mean() for part in np.split(np.mean(losses, axis=0), PARTS)]
            print(f"| {method} |", " | ".join(f"{mean:.1f}" for mean in means), "|")


if __name__ == "__main__":
    main()
