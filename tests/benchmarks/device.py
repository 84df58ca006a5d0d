"""Training steps and samplers on an accelerator, cell by cell within some minutes, next to PyTorch if it sees the device too.

    python -m tests.benchmarks.device --out=FILE.json [--minutes=8] [--cases="cifar10:*,*+sample"]     # patterns, or a cell
    python -m tests.benchmarks.device --out=FILE.json --cases=digits_tshirt:float32+k2                # small enough for a CPU

A cell is CONFIG:PRECISION[+WORD...]. The recipe is that of configs/CONFIG.py, one device takes all of it, weights and data are
random, and nothing is computed twice to save memory. Stable Diffusion's latents are at hand, as in a run. PRECISION is float32,
tf32 (float32 arrays, multiplied as the device does by default) or bfloat16. The words:

    sample          the sampler with 20 calls of the network, in place of a training step
    kN              N training steps in one call (config.compute.steps_per_call)
    aN              N microbatches a step in place of the config's (config.unlearn.accumulation)
    remat           activations are computed again in the backward pass (config.compute.remat)
    xla             no flash attention (RETRACK_ATTENTION=xla)
    torch           the training step of diffusers' network in PyTorch, eager; with bfloat16 by autocast
    channels_last, compiled     of PyTorch: the layout; torch.compile

Every cell is a process: it compiles, warms up, and takes the median of several calls, each of which it waits for. FILE is written
anew after each. A later call skips what FILE holds of this device and version of the package, and tries what failed once more,
last. Cells come by importance; the script ends before one that would outlast the minutes, by what others of its kind took.

The limit that a share is of is the rate of a large matrix product in the same precision, measured here (`matmul:PRECISION`).
"""

import argparse
import fnmatch
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from tests.benchmarks.device_cell import PROBE, Cell
from tests.benchmarks.measure import Table

ROOT = Path(__file__).parents[2]
COMPILED = "bfloat16+torch+channels_last+compiled"
CELLS = (
    "cifar10:bfloat16", "cifar10:tf32", "stable_diffusion:bfloat16", "stable_diffusion:bfloat16+xla", "celebahq:bfloat16",
    f"cifar10:{COMPILED}", "cifar10:tf32+torch", "mnist_tshirt:bfloat16", "mnist_tshirt:bfloat16+k8", "cifar10:bfloat16+k8",
    "celebahq:tf32", "stable_diffusion:tf32", "mnist_tshirt:tf32", f"celebahq:{COMPILED}", f"stable_diffusion:{COMPILED}",
    "cifar10:bfloat16+sample", "stable_diffusion:bfloat16+sample", "celebahq:bfloat16+sample", "mnist_tshirt:bfloat16+sample",
    "stable_diffusion:bfloat16+a4", "celebahq:bfloat16+a4", "stable_diffusion:bfloat16+remat", "cifar10:tf32+torch+channels_last",
    "celebahq:tf32+torch", "celebahq:tf32+torch+channels_last", "stable_diffusion:tf32+torch",
    "stable_diffusion:tf32+torch+channels_last", f"mnist_tshirt:{COMPILED}", "mnist_tshirt:tf32+torch",
    "mnist_tshirt:tf32+torch+channels_last", "cifar10:float32", "celebahq:float32", "stable_diffusion:float32",
    "mnist_tshirt:float32",
)  # fmt: skip
SPELLING = re.compile(r"[^:]+:(float32|tf32|bfloat16)(\+(sample|[ka]\d+|remat|xla|torch|channels_last|compiled))*")
UNKNOWN_SECONDS = 60.0  # what a cell is expected to take before one of its kind was measured


def version() -> str:
    """Returns what a cell's number belongs to: a digest of the package's code, and the libraries' versions."""
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted((ROOT / "retrack_jax").rglob("*.py")))).hexdigest()
    found = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
    return ", ".join([code[:12], *(f"{name} {found[name]}" for name in ("jax", "torch") if name in found)])


def in_own_process(cell: str, seconds: float) -> dict:
    """Returns what `measure` returns in a new process, or an `error`."""
    own = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "2"}
    own |= {"RETRACK_ATTENTION": "xla"} if "xla" in Cell(cell).words else {}
    command = [sys.executable, "-m", "tests.benchmarks.device_cell", cell]
    try:
        done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, cwd=ROOT, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {seconds:.0f} s, at the end of the minutes"}
    if done.returncode:
        return {"error": done.stderr.strip()[-600:] or f"status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def cells_to_measure(names: list[str], known: dict[str, dict], on: dict) -> list[str]:
    """Returns the cells that are not known yet, those that failed last, each after the one that measures its limit."""
    names = [name for name in names if on["torch"] or "torch" not in Cell(name).words]
    names = list(dict.fromkeys(each for name in names for each in (Cell(name).rate, name)))
    new = [name for name in names if name not in known]
    return new + [name for name in names if "error" in known.get(name, {})]


def expected_seconds(cell: Cell, known: dict[str, dict]) -> float:
    """Returns how long a cell will take: as long as the longest of its kind did."""
    return max((row["wall_seconds"] for name, row in known.items() if Cell(name).kind == cell.kind), default=UNKNOWN_SECONDS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/device.json"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--cases", default="*", help="cells, or patterns of those that are listed, separated by commas")
    arguments = parser.parse_args()
    cases = arguments.cases.split(",")
    names = [name for name in CELLS if any(fnmatch.fnmatchcase(name, one) for one in cases)]
    names += [one for one in cases if not fnmatch.filter(CELLS, one)]
    for name in names:
        if not SPELLING.fullmatch(name):
            parser.error(f"no cell is called {name}; they are CONFIG:PRECISION+WORD..., see --help")
    began = time.monotonic()
    on = in_own_process(PROBE, 120)
    if "error" in on:
        raise SystemExit(f"jax sees no device: {on['error']}")
    about = {"device": on["device"], "version": version()}
    cells = json.loads(arguments.out.read_text())["cells"] if arguments.out.exists() else {}
    known = {name: row for name, row in cells.items() if about.items() <= row.items()}
    todo = cells_to_measure(names, known, on)
    print(f"{on['device']}; PyTorch on {on['torch']}; {len(todo)} cells to measure, {len(known)} known", flush=True)
    table = Table("device", "cell", "images/s", "s per call", "of the limit", "peak, GiB", "compiled in, s")
    while todo:
        name, left = todo[0], 60 * arguments.minutes - (time.monotonic() - began)
        if expected_seconds(Cell(name), known) > left:
            print(f"{left:.0f} s are left, too few for {name}; not measured: {', '.join(todo)}. The same command continues.")
            break
        todo.pop(0)
        start = time.monotonic()
        row = in_own_process(name, left)
        row |= about | {"wall_seconds": time.monotonic() - start}
        if "flops" in row:
            row["images_per_second"] = row["images"] / row["seconds"]
            limit = known.get(Cell(name).rate, {}).get("rate")
            row["share_of_limit"] = limit and row["flops"] / row["seconds"] / limit
        cells[name] = known[name] = row
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        partial = arguments.out.with_suffix(".partial")
        partial.write_text(json.dumps({"cells": cells}, indent=1) + "\n")
        partial.replace(arguments.out)
        table.add(name, *shown(row))


def shown(row: dict) -> tuple[str, ...]:
    """Returns the cells of a row of the table."""
    if "error" in row:
        return (row["error"].splitlines()[-1][:100],) + ("",) * 4
    if "rate" in row:
        return "", f"{row['seconds']:.4f}", f"{row['rate'] / 1e12:.2f} TFLOP/s", "", ""
    peak = f"{row['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in row else ""
    share = f"{row['share_of_limit']:.0%}" if row["share_of_limit"] else ""
    compiled = f"{row.get('compile_seconds', row['first_seconds']):.0f}"
    return f"{row['images_per_second']:.1f}", f"{row['seconds']:.3f}", share, peak, compiled


if __name__ == "__main__":
    main()
