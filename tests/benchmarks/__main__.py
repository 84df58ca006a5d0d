"""All benchmarks of the CPU in one command: `make bench`, or `.venv-parity/bin/python -m tests.benchmarks [--out FOLDER]`.

Prints tables and writes them to docs/results, from which `make docs` puts them into docs/measurements/speed.md; writes plots to
docs/images, and all numbers as one line of JSON to FOLDER/benchmarks_cpu.json. On a CPU it takes some twenty minutes. Run it on
a machine that does nothing else.

Accelerators: device.py.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

from tests.benchmarks import neighbors, operations, scaling, startup, training
from tests.benchmarks.measure import Table, compare

# Network, method, rounds, CPU devices of ours.
CPU_STEPS = (
    ("digits", "retrack", 15, 2),
    ("digits", "siss", 15, 2),
    ("digits", "vanilla", 15, 2),
    ("mnist5k_tshirt", "retrack", 3, 2),
    ("cifar10", "retrack", 5, 2),
    ("cifar10", "retrack", 3, 1),
    ("cifar10", "siss", 3, 2),
    ("cifar10", "vanilla", 3, 2),
    ("celebahq", "retrack", 1, 1),
)
# Network, images, calls of the network.
CPU_SAMPLING = (("digits", 128, 50), ("mnist5k_tshirt", 16, 50), ("cifar10", 8, 3))
NEIGHBOR_QUERIES = (1, 100, 1000)


def machine() -> dict:
    """Returns what the numbers depend on."""
    from importlib import metadata

    packages = ("jax", "jaxlib", "flax", "optax", "torch", "diffusers")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    about = {"cpu": cpu, "cores": os.cpu_count(), "load": os.getloadavg(), "python": platform.python_version()}
    return about | {name: metadata.version(name) for name in packages}


def measured(images: Path) -> tuple[dict, list[Table]]:
    """Measures everything; returns all numbers, and the tables that the documents show."""
    rate = training.matmul_rate()
    limit = rate["limit"]
    print(f"Matrix product: {limit / 1e9:.0f} GFLOP/s.", flush=True)
    tables = [Table("speed_steps", *training.COLUMNS)]
    steps = []
    for network, method, rounds, devices in CPU_STEPS:
        steps.append(training.training(network, method, rounds, rate=rate, devices=devices))
        tables[0].add(*training.cells(steps[-1]))
    columns = "ours, s", "PyTorch, s", "ratio", "ours of limit", "PyTorch of limit"
    tables.append(Table("speed_sampling", "sampling, ours on 2 CPU devices", *columns))
    sampling = []
    for network, count, calls in CPU_SAMPLING:
        row = compare("sampling", 5, {"num_devices": 2}, network=network, num_images=count, num_steps=calls)
        sampling.append({"network": network, "images": count, "calls": calls} | row)
        seconds = [row[side]["seconds"] for side in ("ours", "pytorch")]
        shares = [count * calls * training.forward_flops(network) / each / limit for each in seconds]
        numbers = *(f"{each:.2f}" for each in (*seconds, row["ratio"])), *(f"{share:.0%}" for share in shares)
        tables[-1].add(f"{network}, {count} images, {calls} calls", *numbers)
    columns = "ours, s", "scikit-learn, s", "ratio", "ours of limit"
    tables.append(Table("speed_neighbors", "neighbors of Q among 60,000 x 784", *columns))
    searches = neighbors.searches(NEIGHBOR_QUERIES)
    for row in searches:
        numbers = f"{row['ours']:.3f}", f"{row['sklearn']:.3f}", f"{row['ratio']:.1f}"
        tables[-1].add(f"Q = {row['queries']}", *numbers, f"{row['flops'] / row['ours'] / limit:.0%}")
    start = startup.startup(["digits", "cifar10"], rounds=2)
    counted = operations.operations()
    tables += [startup.table(start), operations.table(counted)]
    grown = scaling.scaling(images, list(scaling.PARTS))
    found = {"matrix_product": limit, "steps": steps, "sampling": sampling, "neighbors": searches, "startup": start}
    return found | {"operations": counted, "scaling": grown}, tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/benchmarks", metavar="FOLDER")
    parser.add_argument("--images", default="docs/images", metavar="FOLDER")
    parser.add_argument("--results", default="docs/results", metavar="FOLDER")
    arguments = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ["JAX_PLATFORMS"] = "cpu"
    start, about = time.perf_counter(), machine()
    found, tables = measured(Path(arguments.images))
    found = {"machine": about, **found, "minutes": (time.perf_counter() - start) / 60}
    described = ", ".join(f"{name} {value}" for name, value in about.items() if name != "load")
    for table in tables:
        table.write(Path(arguments.results), "make bench", f"{described}; load average {about['load'][0]:.1f} at the start")
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found)
    (folder / "benchmarks_cpu.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
