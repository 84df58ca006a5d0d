"""The loss of a forgotten image in all eight orientations, under the model before unlearning and under each model of a workdir.

    python -m tests.benchmarks.orientations --config=configs/mnist5k_tshirt.py --workdir=runs/mnist5k [--results=docs/results]

The verdict takes the loss of a turned copy, under the model before unlearning, for the loss that the image would have if it were
unseen (evaluate/verdict.py). A retrained model has not seen any of the eight, so there all should have one loss, and that loss is
what the copies before unlearning should have had. The draws are the verdict's.
"""

import numpy as np

from retrack_jax.problem.conditioning import remembered_conditions
from retrack_jax.problem.judged import losses
from retrack_jax.report.catalogue import method_label
from retrack_jax.run.context import Run
from retrack_jax.run.training import load, unlearning
from retrack_jax.unlearn.methods import METHODS, PRETRAINED
from tests.benchmarks.measure import Table, parser_of
from tests.benchmarks.opened import opened

NAMES = "upright", "quarter left", "half", "quarter right", "mirrored", "and quarter left", "and half", "and quarter right"


def orientations(image: np.ndarray) -> np.ndarray:
    """Returns the eight orientations of `image` `[H, H, C]`, in the order of `NAMES`."""
    return np.stack([np.rot90(each, turns) for each in (image, image[:, ::-1]) for turns in range(4)])


def main() -> None:
    parser = parser_of(__doc__)
    options, rest = parser.parse_known_args()
    context, params = opened(rest)
    problem, (target,) = context.problem, context.targets.values()
    images = orientations(problem.codec.clean(target.images, target.unique[:1])[0])
    conditions = remembered_conditions(problem.conditioning, target, [(target.images, target.unique[:1])])
    shown = Table(f"orientations_{context.options.name}", "loss on the image", *NAMES)

    def row(name: str, params) -> None:
        shown.add(name, *(f"{loss:.0f}" for loss in losses(problem, params, images, conditions, name).mean(axis=1)))

    row(method_label(PRETRAINED), params)
    for run in (Run(context, method, target, seed) for method in METHODS for seed in context.options.seeds):
        if (run.folder / "metrics.json").exists():
            row(f"{method_label(run.method)}, seed {run.seed}", load(unlearning(run), context).params)
    name = context.options.name
    shown.write(options.results, f"python -m tests.benchmarks.orientations --config=configs/{name}.py --workdir=runs/{name}")


if __name__ == "__main__":
    main()
