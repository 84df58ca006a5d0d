"""All benchmarks in one command: `make bench`, or `.venv-parity/bin/python -m tests.benchmarks [--device cuda] [--out
results/...]`.

Prints a table and one line of JSON, which is also written to FOLDER/benchmarks_cpu.json, and writes plots to
docs/images. On a CPU it takes some ten minutes. Run it on a machine that does nothing else. `--device cuda` measures the
training step in float32, TF32, bf16 and against `torch.compile`, and sampling, on one GPU.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

from tests.benchmarks import operations, scaling, startup, training
from tests.benchmarks.measure import compare

# Network, method, rounds: as many as ten minutes hold.
CPU_STEPS = (
    ("digits", "retrack", 15),
    ("digits", "siss", 15),
    ("digits", "vanilla", 15),
    ("cifar10", "retrack", 5),
    ("cifar10", "siss", 3),
    ("cifar10", "vanilla", 3),
    ("celebahq", "retrack", 2),
)
GPU_BATCH = {"digits": (64, 64), "cifar10": (64, 64), "celebahq": (4, 4)}


def machine() -> dict:
    """Returns what the numbers depend on."""
    from importlib import metadata

    packages = ("jax", "jaxlib", "flax", "optax", "torch", "diffusers")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"cpu": cpu, "cores": os.cpu_count(), "load": os.getloadavg(), "python": platform.python_version()} | {
        name: metadata.version(name) for name in packages
    }


def on_cpu(images: Path) -> dict:
    """Measures everything on CPU; prints each table as it is made."""
    rate = training.matmul_rate()
    print(training.HEADER, flush=True)
    steps = []
    for network, method, rounds in CPU_STEPS:
        steps.append(training.training(network, method, rounds, rate=rate))
        print(training.line(steps[-1]), flush=True)
    sampling = {
        network: compare("sampling", 3, network=network, num_images=images_drawn, num_steps=num_steps)
        for network, images_drawn, num_steps in (("digits", 64, 50), ("cifar10", 8, 3))
    }
    print("\n| sampling | ours, s | PyTorch, s | ratio |\n|---|---|---|---|")
    for network, row in sampling.items():
        print(f"| {network} | {row['ours']['seconds']:.2f} | {row['pytorch']['seconds']:.2f} | {row['ratio']:.2f} |")
    start = startup.startup(["digits", "cifar10"], rounds=2)
    print("", startup.table(start), "", sep="\n", flush=True)
    counted = operations.operations()
    print(operations.table(counted), flush=True)
    grown = scaling.scaling(images, list(scaling.PARTS))
    return {"steps": steps, "sampling": sampling, "startup": start, "operations": counted, "scaling": grown}


def on_gpu() -> dict:
    """Measures training steps in every precision, and sampling, on one GPU."""
    steps = []
    print(training.HEADER, flush=True)
    for variant in training.VARIANTS:
        rate = training.matmul_rate("cuda", variant)
        for network, batch in GPU_BATCH.items():
            steps.append(training.training(network, "retrack", 5, "cuda", variant, batch, rate))
            print(training.line(steps[-1]), flush=True)
    jobs = {
        "float32": ({"precision": "highest"}, {}),
        "bf16": ({"dtype": "bfloat16"}, {"bf16": True}),
        "compile": ({"dtype": "bfloat16"}, {"bf16": True, "compiled": True}),
    }
    same = {"network": "cifar10", "num_images": 256, "num_steps": 50, "device": "cuda"}
    sampling = {name: compare("sampling", 3, *sides, **same) for name, sides in jobs.items()}
    for name, row in sampling.items():
        print(f"sampling {name}: ours {256 / row['ours']['seconds']:.1f} images/s, PyTorch {256 / row['pytorch']['seconds']:.1f}")
    return {"steps": steps, "sampling": sampling}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", default="runs/benchmarks", metavar="FOLDER")
    parser.add_argument("--images", default="docs/images", metavar="FOLDER")
    arguments = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if arguments.device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    start = time.perf_counter()
    found = {"machine": machine()} | (on_cpu(Path(arguments.images)) if arguments.device == "cpu" else on_gpu())
    found["minutes"] = (time.perf_counter() - start) / 60
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found)
    (folder / f"benchmarks_{arguments.device}.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
