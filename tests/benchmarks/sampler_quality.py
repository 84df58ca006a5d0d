"""What each sampler costs and what FID it gives, on a trained model: the tables of docs.

    .venv/bin/python -m tests.benchmarks.sampler_quality --config=configs/digits_tshirt.py --workdir=runs/digits_tshirt
        [--images=2000] [--sets=3] [--only=ddpm:50,ddim:20] [--table=NAME --results=docs/results]

The workdir is one that `retrack_jax.main` made with that config; its pretrained model is sampled, all samplers from the same
noise. Every set holds other images (indices 0.., N.., 2N..), so the spread over sets is the sampling error of FID and frequency;
runs of more than 100 calls make one set. ± is the standard deviation over sets. Seconds are for sampling alone, after compiling.
"""

import statistics
import sys
import tempfile
import time

import jax
from etils import epath

from retrack_jax.cli import flags as command_line
from retrack_jax.cli.process import set_up_jax
from retrack_jax.config.reading import read_config
from retrack_jax.config.rules import complete
from retrack_jax.data.dataset import unit_to_pixels
from retrack_jax.problem.evaluation import EvaluatedModel
from retrack_jax.problem.problem import build_problem
from retrack_jax.run.context import RunContext
from retrack_jax.run.training import load, pretrained
from retrack_jax.run.workdir import Workdir
from retrack_jax.sampling import generate, make_sample_fn, make_sampler, num_calls, pmap_sample_fn
from tests.benchmarks.measure import Table, parser_of

ROWS = (
    ("ddpm", 1000), ("ddpm", 250), ("ddpm", 100), ("ddpm", 50), ("ddpm", 20), ("ddim", 100), ("ddim", 50), ("ddim", 20),
    ("ddim", 10), ("dpm_solver", 50), ("dpm_solver", 20), ("dpm_solver", 10), ("pndm", 50), ("pndm", 20),
)  # fmt: skip
METRICS = ("frequency", "fid")
COLUMNS = "sampler and steps", "calls per image", "FID", "to the first row's", "T-shirts (%)", "s per 1000 images"


def measure(context: RunContext, params, name: str, num_steps: int, images: int, sets: int) -> dict:
    """Returns one row: network calls per image, seconds for 1,000 images, and each metric's values over the sets."""
    problem, sampling = context.problem, context.options.sampling
    sampler = make_sampler(name, problem.denoiser.schedule, num_steps)
    p_sample = pmap_sample_fn(make_sample_fn(problem.denoiser.eps_fn, sampler, problem.denoiser.shape), output="float32")
    options = dict(rng=jax.random.key(sampling.seed), batch_size=sampling.batch_size)
    generate(p_sample, params, num_images=sampling.batch_size, **options)  # compiles
    (target,) = context.targets.values()
    calls, seconds, values = num_calls(sampler), [], {metric: [] for metric in METRICS}
    for index in range(sets if calls <= 100 else 1):
        start = time.perf_counter()
        made = generate(p_sample, params, num_images=images, first=index * images, **options)
        seconds.append(time.perf_counter() - start)
        arrays = {"samples": unit_to_pixels(made), "samples_float": made}
        with tempfile.TemporaryDirectory() as folder:
            path = epath.Path(folder) / "metrics.json"
            model = EvaluatedModel(
                params=lambda: params, pretrained=lambda: params, arrays=arrays, path=path, workdir=context.workdir.root
            )
            results = problem.evaluation.evaluate(target, model)
        for metric in METRICS:
            values[metric].append(results.values[metric])
    return {"calls": calls, "seconds_per_1000": statistics.median(seconds) / images * 1000, **values}


def shown(values: list[float], scale: float = 1.0) -> str:
    """Returns mean and, of several, ± their standard deviation."""
    mean = f"{scale * statistics.mean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} ± {scale * statistics.stdev(values):.2f}"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--sets", type=int, default=3)
    parser.add_argument("--only", default="", help="such as ddpm:50,ddim:20")
    parser.add_argument("--table", default="samplers", help="the name of the result")
    arguments, rest = parser.parse_known_args()
    config, workdir = command_line.parse([sys.argv[0], *rest])
    set_up_jax(config.compute.cpu_devices)
    with config.unlocked():
        config.eval.metrics = METRICS
    problem = build_problem(complete(read_config(config)))
    spec = problem.options.target_specs[0]
    context = RunContext(problem, {spec: problem.target(spec)}, Workdir(workdir), lambda: False)
    params = pretrained(context, load).params
    wanted = [tuple(row.split(":")) for row in arguments.only.split(",")] if arguments.only else ROWS
    table, first = Table(arguments.table, *COLUMNS), None
    for name, num_steps in wanted:
        row = measure(context, params, name, int(num_steps), arguments.images, arguments.sets)
        fid = statistics.mean(row["fid"])
        first = first or fid
        table.add(
            f"`{name}`, {num_steps}", f"{row['calls']}", shown(row["fid"]), f"{fid / first - 1:+.1%}",
            shown(row["frequency"], 100), f"{row['seconds_per_1000']:.2f}",
        )  # fmt: skip
        table.write(arguments.results, f"python -m tests.benchmarks.sampler_quality {' '.join(sys.argv[1:])}")


if __name__ == "__main__":
    main()
