"""All benchmarks of the CPU in one command: `make bench`, or `.venv-parity/bin/python -m tests.benchmarks`.

Prints tables and writes them to docs/results, from which `make docs` puts them into docs/measurements/speed.md; writes plots to
docs/images, and all numbers as one line of JSON to FOLDER/benchmarks_cpu.json. On a CPU it takes half an hour. Run it on
a machine that does nothing else.

Accelerators: device.py. What a step is made of: parts.py and convolutions.py.
"""

import json
import os
import time
from pathlib import Path

from tests.benchmarks import neighbors, operations, scaling, startup, training
from tests.benchmarks.measure import Table, compare, parser_of, this_machine

# Network, method, images in each of the two batches (None: the recipe's), rounds, CPU devices of ours.
CPU_STEPS = (
    ("digits", "retrack", None, 15, 2),
    ("digits", "siss", None, 15, 2),
    ("digits", "vanilla", None, 15, 2),
    ("mnist5k_tshirt", "retrack", None, 3, 2),
    ("mnist5k_tshirt", "vanilla", 32, 5, 2),
    ("cifar10", "retrack", None, 5, 2),
    ("cifar10", "retrack", None, 3, 1),
    ("cifar10", "siss", None, 3, 2),
    ("cifar10", "vanilla", None, 3, 2),
    ("celebahq", "retrack", None, 1, 1),
)
# Network, images, calls of the network.
CPU_SAMPLING = (("digits", 128, 50), ("mnist5k_tshirt", 16, 50), ("cifar10", 8, 3))
NEIGHBOR_QUERIES = (1, 100, 1000)
SIDES = ("ours", "pytorch")


def steps(rate: dict) -> tuple[list[dict], Table]:
    """Returns training steps, and their table."""
    table, rows = Table("speed_steps", *training.COLUMNS), []
    for network, method, images, rounds, devices in CPU_STEPS:
        batch = images and (images, images)
        rows.append(training.training(network, method, rounds, batch=batch, rate=rate, devices=devices))
        table.add(*training.cells(rows[-1]))
    return rows, table


def sampling(limit: float) -> tuple[list[dict], Table]:
    """Returns samplers, and their table."""
    columns = "ours, s", "PyTorch, s", "ratio", "ours of limit", "PyTorch of limit"
    table, rows = Table("speed_sampling", "sampling, ours on 2 CPU devices", *columns), []
    for network, count, calls in CPU_SAMPLING:
        row = compare("sampling", 5, {"num_devices": 2}, network=network, num_images=count, num_steps=calls)
        rows.append({"network": network, "images": count, "calls": calls} | row)
        seconds = [row[side]["seconds"] for side in SIDES]
        shares = [count * calls * training.forward_flops(network) / each / limit for each in seconds]
        numbers = *(f"{each:.2f}" for each in (*seconds, row["ratio"])), *(f"{share:.0%}" for share in shares)
        table.add(f"{network}, {count} images, {calls} calls", *numbers)
    return rows, table


def whole_run(trained: list[dict], sampled: list[dict]) -> Table:
    """Returns what the steps and samples of a run of mnist5k_tshirt take, from the other two tables."""
    mine = {row["method"]: row for row in trained if row["network"] == "mnist5k_tshirt"}
    (samples,) = (row for row in sampled if row["network"] == "mnist5k_tshirt")
    parts = (
        ("4,000 steps of pretraining", 4000, "32", mine["vanilla"]),
        ("50 steps of ReTrack", 50, "128 + 128", mine["retrack"]),
        ("1,000 samples, 16 at once", 1000 / 16, "16 x 50 calls", samples),
    )
    table = Table("speed_whole_run", "part of the run", "images", "ours, s", "PyTorch, s", "ratio", "ours, GiB", "PyTorch, GiB")
    for name, _, images, row in parts:
        seconds, memory = ([row[side][what] for side in SIDES] for what in ("seconds", "peak_bytes"))
        table.add(
            name, images, *(f"{each:.3g}" for each in seconds), f"{row['ratio']:.2f}", *(f"{each / 2**30:.2f}" for each in memory)
        )
    ours, theirs = (sum(times * row[side]["seconds"] for _, times, _, row in parts) for side in SIDES)
    table.add("all of it, minutes", "", f"{ours / 60:.0f}", f"{theirs / 60:.0f}", f"{theirs / ours:.2f}", "", "")
    return table


def searches(limit: float) -> tuple[list[dict], Table]:
    """Returns searches for neighbors, and their table."""
    table = Table("speed_neighbors", "neighbors of Q among 60,000 x 784", "ours, s", "scikit-learn, s", "ratio", "ours of limit")
    rows = neighbors.searches(NEIGHBOR_QUERIES)
    for row in rows:
        numbers = f"{row['ours']:.3f}", f"{row['sklearn']:.3f}", f"{row['ratio']:.1f}"
        table.add(f"Q = {row['queries']}", *numbers, f"{row['flops'] / row['ours'] / limit:.0%}")
    return rows, table


def main() -> None:
    parser = parser_of(__doc__)
    parser.set_defaults(results=Path("docs/results"))
    parser.add_argument("--out", default="runs/benchmarks", metavar="FOLDER", type=Path)
    parser.add_argument("--images", default="docs/images", metavar="FOLDER", type=Path)
    parser.add_argument("--steps", action="store_true", help="the training steps alone, a third of the time")
    arguments = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ["JAX_PLATFORMS"] = "cpu"
    began, found = time.perf_counter(), {"machine": this_machine()}
    rate = training.matmul_rate()
    found["matrix_product"] = limit = rate["limit"]
    print(f"Matrix product: {limit / 1e9:.0f} GFLOP/s.", flush=True)
    found["steps"], *tables = steps(rate)
    if arguments.steps:
        tables[0].write(arguments.results, "python -m tests.benchmarks --steps")
        return
    for name, (rows, table) in (("sampling", sampling(limit)), ("neighbors", searches(limit))):
        found[name] = rows
        tables.append(table)
    found["startup"] = startup.startup(["digits", "cifar10"], rounds=2)
    found["operations"] = operations.operations()
    tables += [
        whole_run(found["steps"], found["sampling"]),
        startup.table(found["startup"]),
        operations.table(found["operations"]),
    ]
    found["scaling"] = scaling.scaling(arguments.images, list(scaling.PARTS))
    found["minutes"] = (time.perf_counter() - began) / 60
    for table in tables:
        table.write(arguments.results, "make bench")
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found)
    (arguments.out / "benchmarks_cpu.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
