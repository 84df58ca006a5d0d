"""How much easier upright images are than upside-down ones, to a model that knows their kind and to one that does not.

    python -m tests.benchmarks.upright digits_tshirt=runs/digits_tshirt digits_flow=runs/digits_flow [--results=docs/results]

Each argument is a config and its workdir. A verdict's second reference (evaluate/verdict.py) takes images turned by a quarter for
a kind that the model does not know. The table has log(L / L~) of the remaining images that a verdict measures and of what is made
of them: mean and standard deviation over images whose turned copy differs enough. The draws are the verdict's.
"""

import numpy as np

from retrack_jax.evaluate.turned import turned_copies
from retrack_jax.problem.judged import judged, losses
from tests.benchmarks.measure import Table, parser_of
from tests.benchmarks.opened import opened


def kinds(images: np.ndarray) -> dict[str, np.ndarray]:
    """Returns what is made of `images` `[N, H, H, C]` in [-1, 1]."""
    rng = np.random.default_rng(0)
    return {
        "the images": images,
        "with noise": np.clip(images + 0.3 * rng.standard_normal(images.shape), -1, 1).astype(np.float32),
        "two on top of each other": np.maximum(images, np.roll(images, 1, axis=0)),
        "turned by a quarter": np.rot90(images, axes=(1, 2)),
        "with black and white exchanged": -images,
    }


def upright(name: str, workdir: str) -> dict[str, str]:
    """Returns a cell for each of `kinds` of the remaining images of config `name`, under the pretrained model of `workdir`."""
    context, params = opened([f"--config=configs/{name}.py", f"--workdir={workdir}"])
    problem, (target,) = context.problem, context.targets.values()
    chosen = judged(problem, target)
    assert chosen.conditions is None, f"{name} is conditional"
    cells = {}
    for kind, images in kinds(chosen.images[len(chosen.names) :][: chosen.num_remaining]).items():
        turned, usable = turned_copies(images)
        of_images, of_turned = (losses(problem, params, those[usable], None, kind).mean(axis=1) for those in (images, turned))
        easier = np.log(of_images / of_turned)
        cells[kind] = f"{easier.mean():.2f} ± {easier.std(ddof=1):.2f}"
    return cells


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("experiments", nargs="+", metavar="CONFIG=WORKDIR")
    options = parser.parse_args()
    columns = {(parts := one.partition("="))[0]: upright(parts[0], parts[2]) for one in options.experiments}
    shown = Table("upright", "log(L / L~)", *(f"`{name}`" for name in columns))
    for kind in next(iter(columns.values())):
        shown.add(kind, *(cells[kind] for cells in columns.values()))
    runs = " ".join(f"{name}=runs/{name}" for name in columns)
    shown.write(options.results, f"python -m tests.benchmarks.upright {runs}")


if __name__ == "__main__":
    main()
