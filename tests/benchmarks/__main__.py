"""All benchmarks in one command: `make bench`, or `.venv-parity/bin/python -m tests.benchmarks [--device cuda] [--out
results/...]`.

Prints tables, which replace those in docs/measurements/speed.md, and one line of JSON, which is also written to
FOLDER/benchmarks_cpu.json, and writes plots to docs/images. On a CPU it takes some twenty minutes. Run it on a machine that
does nothing else. `--device cuda` measures the training step in float32, TF32, bf16 and against `torch.compile`, and
sampling, on one GPU; `.venv-parity` must then hold builds for it, for `make parity` installs those for the CPU:
`.venv-parity/bin/pip install "jax[cuda12]" torch==2.13.0` from indexes that have them.
"""

import argparse
import json
import os
import platform
import subprocess
import time
from pathlib import Path

from tests.benchmarks import neighbors, operations, scaling, startup, training
from tests.benchmarks.measure import compare

# Network, method, rounds, CPU devices of ours.
CPU_STEPS = (
    ("digits", "retrack", 15, 2),
    ("digits", "siss", 15, 2),
    ("digits", "vanilla", 15, 2),
    ("cifar10", "retrack", 5, 2),
    ("cifar10", "retrack", 3, 1),
    ("cifar10", "siss", 3, 2),
    ("cifar10", "vanilla", 3, 2),
    ("celebahq", "retrack", 1, 1),
)
# Network, images, calls of the network.
CPU_SAMPLING = (("digits", 128, 50), ("cifar10", 8, 3))
NEIGHBOR_QUERIES = (1, 100, 1000)
# The document has a place for each device.
MARKS = {device: (f"<!-- measured on {device} -->", f"<!-- end of measured on {device} -->") for device in ("cpu", "cuda")}
GPU_BATCH = {"digits": (64, 64), "cifar10": (64, 64), "celebahq": (4, 4)}


def machine(device: str) -> dict:
    """Returns what the numbers depend on."""
    from importlib import metadata

    packages = ("jax", "jaxlib", "flax", "optax", "torch", "diffusers")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    gpu = {}
    if device == "cuda":
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        gpu = {"gpu": subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]}
    return gpu | {"cpu": cpu, "cores": os.cpu_count(), "load": os.getloadavg(), "python": platform.python_version()} | {
        name: metadata.version(name) for name in packages
    }


def say(lines: list[str], *more: str) -> None:
    """Prints lines of a table as they are made, and keeps them for the document."""
    for text in more:
        print(text, flush=True)
        lines.append(text)


def write_document(document: Path, lines: list[str], found: dict, device: str) -> None:
    """Puts the tables between the device's two marks of `document`."""
    begin, end = MARKS[device]
    before, rest = document.read_text().split(begin)
    after = rest.split(end)[1]
    about = ", ".join(f"{name} {value}" for name, value in found["machine"].items() if name != "load")
    load = f"Measured on {about}; load average {found['machine']['load'][0]:.1f} at the start, {found['minutes']:.0f} minutes."
    document.write_text("\n".join([before + begin, load, "", *lines, end + after]))


def on_cpu(images: Path, lines: list[str]) -> dict:
    """Measures everything on CPU; adds to `lines` each table as it is made."""
    rate = training.matmul_rate()
    say(lines, f"Matrix product: {rate['limit'] / 1e9:.0f} GFLOP/s.", "", training.HEADER)
    steps = []
    for network, method, rounds, devices in CPU_STEPS:
        steps.append(training.training(network, method, rounds, rate=rate, devices=devices))
        say(lines, training.line(steps[-1]))
    say(lines, "", "| sampling, ours on 2 CPU devices | ours, s | PyTorch, s | ratio | ours of limit | PyTorch of limit |")
    say(lines, "|---|---|---|---|---|---|")
    sampling = []
    for network, count, calls in CPU_SAMPLING:
        row = compare("sampling", 5, {"num_devices": 2}, network=network, num_images=count, num_steps=calls)
        sampling.append({"network": network, "images": count, "calls": calls} | row)
        seconds = [row[side]["seconds"] for side in ("ours", "pytorch")]
        shares = [count * calls * training.forward_flops(network) / each / rate["limit"] for each in seconds]
        numbers = f"{seconds[0]:.2f} | {seconds[1]:.2f} | {row['ratio']:.2f} | {shares[0]:.0%} | {shares[1]:.0%}"
        say(lines, f"| {network}, {count} images, {calls} calls | {numbers} |")
    say(lines, "", "| neighbors of Q among 60,000 x 784 | ours, s | scikit-learn, s | ratio | ours of limit |")
    say(lines, "|---|---|---|---|---|")
    searches = neighbors.searches(NEIGHBOR_QUERIES)
    for row in searches:
        share = row["flops"] / row["ours"] / rate["limit"]
        say(lines, f"| Q = {row['queries']} | {row['ours']:.3f} | {row['sklearn']:.3f} | {row['ratio']:.1f} | {share:.0%} |")
    start = startup.startup(["digits", "cifar10"], rounds=2)
    say(lines, "", startup.table(start), "")
    counted = operations.operations()
    say(lines, operations.table(counted))
    grown = scaling.scaling(images, list(scaling.PARTS))
    found = {"steps": steps, "sampling": sampling, "neighbors": searches, "startup": start}
    return found | {"operations": counted, "scaling": grown}


def on_gpu(lines: list[str]) -> dict:
    """Measures training steps in every precision, and sampling, on one GPU."""
    steps = []
    say(lines, training.HEADER)
    for variant in training.VARIANTS:
        rate = training.matmul_rate("cuda", variant)
        for network, batch in GPU_BATCH.items():
            steps.append(training.training(network, "retrack", 5, "cuda", variant, batch, rate))
            say(lines, training.line(steps[-1]))
    jobs = {
        "float32": ({"precision": "highest"}, {}),
        "bf16": ({"dtype": "bfloat16"}, {"bf16": True}),
        "compile": ({"dtype": "bfloat16"}, {"bf16": True, "compiled": True}),
    }
    same = {"network": "cifar10", "num_images": 256, "num_steps": 50, "device": "cuda"}
    sampling = {name: compare("sampling", 3, *sides, **same) for name, sides in jobs.items()}
    for name, row in sampling.items():
        ours, theirs = (256 / row[side]["seconds"] for side in ("ours", "pytorch"))
        say(lines, "", f"Sampling {name}: ours {ours:.1f} images/s, PyTorch {theirs:.1f}.")
    return {"steps": steps, "sampling": sampling}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", default="runs/benchmarks", metavar="FOLDER")
    parser.add_argument("--images", default="docs/images", metavar="FOLDER")
    parser.add_argument("--document", default="docs/measurements/speed.md", help="whose tables are replaced; empty: none")
    arguments = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if arguments.device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    start = time.perf_counter()
    lines: list[str] = []
    about = {"machine": machine(arguments.device)}
    found = about | (on_cpu(Path(arguments.images), lines) if arguments.device == "cpu" else on_gpu(lines))
    found["minutes"] = (time.perf_counter() - start) / 60
    if arguments.document:
        write_document(Path(arguments.document), lines, found, arguments.device)
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found)
    (folder / f"benchmarks_{arguments.device}.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
