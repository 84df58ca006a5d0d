"""One cell of device.py, measured in this process: `python -m tests.benchmarks.device_cell CELL`. Prints a line of JSON.

FLOPs are those of the network: one forward pass of an image (programs.py `forward_flops`) times images, times 3 for training. The
compiler's own count, `compiled_flops`, takes the body of a loop once and leaves out what libraries' kernels do. Seconds by kind
of kernel are those of one call that is traced, on a GPU alone; what a kernel does is guessed from its name.
"""

import importlib.util
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PROBE, MATMUL = "probe", "matmul"
CALLS, SAMPLED = 20, {"cifar10": 512, "celebahq": 32, "stable_diffusion": 16, "mnist_tshirt": 512}
MOST_CALLS, LEAST_CALLS, MOST_SECONDS = 10, 3, 6.0
# The first that a kernel's name holds.
KINDS = {
    "attention": "fmha|flash|attention",
    "convolution": "conv(?!ert)|fprop|dgrad|wgrad|implicit",
    "copy": "memcpy|memset|copy|transpose",
    "matrix product": "gemm|cutlass|nvjet|matmul|dot",
    "reduction": "reduc|softmax|norm",
    "elementwise": "fusion|elementwise|loop",
}


@dataclass(frozen=True)
class Cell:
    """CONFIG:PRECISION+WORD+WORD."""

    name: str

    @property
    def network(self) -> str:
        return self.name.split(":")[0]

    @property
    def words(self) -> list[str]:
        """The precision and what follows it."""
        return self.name.partition(":")[2].split("+")

    @property
    def kind(self) -> tuple[str, bool]:
        """Cells of one kind take about as long."""
        return self.network, "torch" in self.words

    @property
    def rate(self) -> str:
        """The cell that measures the limit."""
        return f"{MATMUL}:{self.words[0]}"

    def number(self, letter: str) -> int | None:
        """Returns N of the word kN or aN, if there is one."""
        return next((int(word[1:]) for word in self.words if re.fullmatch(rf"{letter}\d+", word)), None)


def probe() -> dict:
    """Returns jax's device, its platform, and the device of PyTorch that is the same: None if there is none."""
    import jax

    device, torch_device = jax.devices()[0], None
    if all(importlib.util.find_spec(name) for name in ("torch", "diffusers")):
        import torch

        same = {"cpu": "cpu", "gpu": "cuda" if torch.cuda.is_available() else None}
        torch_device = same.get(device.platform)
    return {"device": device.device_kind, "platform": device.platform, "torch": torch_device}


def measure(cell: Cell) -> dict:
    """Measures one cell in this process."""
    import jax

    jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/retrack_jax/benchmarks"))
    jax.config.update("jax_default_matmul_precision", "highest" if "float32" in cell.words else "default")
    if cell.network == MATMUL:
        from tests.benchmarks.ours import make_matmul

        size = 512 if jax.default_backend() == "cpu" else 8192
        found = timed(make_matmul(size, "bfloat16" if "bfloat16" in cell.words else "float32"))
        return found | {"rate": 10 * 2 * size**3 / min(found["all_seconds"])}
    if "torch" in cell.words:
        import torch

        has_gpu = torch.cuda.is_available()
        found = timed(torch_call(cell, "cuda" if has_gpu else "cpu"))
        return found | network_flops(cell) | ({"peak_bytes": torch.cuda.max_memory_allocated()} if has_gpu else {})
    run, about = jax_call(cell)
    found = about | timed(run)
    memory = jax.local_devices()[0].memory_stats() or {}
    found |= {"peak_bytes": memory["peak_bytes_in_use"]} if "peak_bytes_in_use" in memory else {}
    try:
        found["seconds_by_kind"] = traced(run)
    except Exception as error:  # a profiler that this machine's driver refuses is no reason to lose the rest
        found["trace_error"] = str(error)[:300]
    return found | network_flops(cell)


def jax_call(cell: Cell) -> tuple[Callable, dict]:
    """Returns a function of no argument that waits for one call, and what is known of it before it is run."""
    import jax
    import jax.numpy as jnp

    from retrack_jax.train.state import create_state
    from tests.benchmarks.programs import programs, random_arrays

    own = {"dtype": jnp.dtype("bfloat16" if "bfloat16" in cell.words else "float32"), "remat": "remat" in cell.words}
    sizes = {"accumulation": cell.number("a"), "steps": cell.number("k") or 1, "sampled": SAMPLED.get(cell.network, 4)}
    of, samples = programs(cell.network, calls=CALLS, **sizes, **own), "sample" in cell.words
    fn, shapes = (of.sampler, of.sampler_arguments) if samples else (of.step, of.step_arguments)
    began = time.perf_counter()
    compiled = fn.lower(*shapes).compile()
    about, plan = {"compile_seconds": time.perf_counter() - began}, compiled.memory_analysis()
    planned = plan.argument_size_in_bytes + plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    about |= {"compiled_flops": compiled.cost_analysis().get("flops"), "planned_bytes": planned}
    first, *rest = shapes
    first = random_arrays(first) if samples else create_state(random_arrays(first.params), first.tx)
    first, rest = jax.device_put((first, random_arrays(rest)), jax.local_devices()[0])

    def run() -> None:
        nonlocal first
        result = compiled(first, *rest)
        first = first if samples else result[0]
        jax.block_until_ready(result)

    return run, about


def torch_call(cell: Cell, device: str) -> Callable:
    """Returns a function of no argument that waits for a training step of PyTorch."""
    from tests.benchmarks.programs import options_of
    from tests.benchmarks.theirs import make_training

    recipe, how = options_of(cell.network).recipe("retrack"), {word: word in cell.words for word in ("channels_last", "compiled")}
    how |= {"bf16": "bfloat16" in cell.words, "tf32": "float32" not in cell.words, "device": device}
    batch, parts = (recipe.batch_size,) * 2, cell.number("a") or recipe.accumulation
    return make_training(cell.network, "retrack", batch, accumulation=parts, **how)


def network_flops(cell: Cell) -> dict:
    """Returns the images of one call and the FLOPs of the network for them."""
    from tests.benchmarks.programs import forward_flops, network_of, options_of

    options = options_of(cell.network)
    one = forward_flops(network_of(cell.network, options))
    if "sample" in cell.words:
        guided = 2 if cell.network == "stable_diffusion" else 1
        return {"images": SAMPLED.get(cell.network, 4), "flops": one * SAMPLED.get(cell.network, 4) * CALLS * guided}
    images = 2 * options.recipe("retrack").batch_size * (cell.number("k") or 1)  # the remaining and the forgotten
    return {"images": images, "flops": 3 * one * images}


def timed(run: Callable) -> dict:
    """Returns the seconds of the first call, and the median of those after the second."""
    seconds = []
    while len(seconds) < LEAST_CALLS + 2 or (len(seconds) < MOST_CALLS + 2 and sum(seconds[2:]) < MOST_SECONDS):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return {"first_seconds": seconds[0], "seconds": statistics.median(seconds[2:]), "all_seconds": seconds[2:]}


def traced(run: Callable) -> dict[str, float]:
    """Returns `seconds_by_kind` of one call."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (path,) = Path(folder).rglob("*.xplane.pb")
        return seconds_by_kind(jax.profiler.ProfileData.from_file(str(path)))


def seconds_by_kind(data) -> dict[str, float]:
    """Returns the seconds that the GPU spent in each kind of kernel; `data` is a `jax.profiler.ProfileData`."""
    found = Counter()
    for plane in data.planes:
        for line in plane.lines:
            if plane.name.startswith("/device:GPU") and line.name.startswith("Stream"):
                for event in line.events:
                    fits = (kind for kind, names in KINDS.items() if re.search(names, event.name, re.IGNORECASE))
                    found[next(fits, "other")] += event.duration_ns / 1e9
    return dict(found.most_common())


if __name__ == "__main__":
    print(json.dumps(probe() if sys.argv[1] == PROBE else measure(Cell(sys.argv[1]))))
