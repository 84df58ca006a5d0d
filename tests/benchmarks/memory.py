"""Memory of one ReTrack step of a config on one device, as the compiler plans it; nothing is run and no weights are made.

    python -m tests.benchmarks.memory [--tpu=v5e:2x2] [CONFIG[:OPTION] ...]    # such as celebahq:remat; without cells all of them

CONFIG: digits_tshirt, mnist_tshirt, cifar10, celebahq (stable_diffusion: sd_memory.py). OPTION: float32, bfloat16, remat,
bfloat16+remat, and any of these with +aN for N microbatches per step in place of the config's number. Batch sizes, K and
microbatches are the config's own; the networks of cifar10 and celebahq are those of their checkpoints.

The figures are XLA's buffer assignment for the backend at hand: arguments (parameters, AdamW's two moments, the batch), which are
updated in place, and temporaries (gradients and activations). The CPU's compiler does not schedule for memory and takes
convolutions in another way than an accelerator's, so from there they are upper figures, good for comparing options.

`--tpu` asks the compiler for TPUs, which needs no TPU: `pip install --no-deps --target DIR libtpu`, then
`TPU_LIBRARY_PATH=DIR/libtpu/libtpu.so TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu` before the command. It plans for one chip of the
topology and schedules for its memory; a step that does not fit is an error that says what it would have needed. A cell takes
minutes.
"""

import functools
import os
import re
import sys
import time

import jax
import jax.numpy as jnp

from tests.benchmarks.measure import Table
from tests.benchmarks.programs import programs

GIB = 2**30
TABLE = {
    "digits_tshirt": ("float32", "bfloat16", "remat", "float32+a4"),
    "mnist_tshirt": ("float32", "bfloat16", "remat", "float32+a4"),
    "cifar10": ("float32", "bfloat16", "remat", "float32+a4"),
    "celebahq": ("float32", "bfloat16", "remat", "bfloat16+remat"),
}


def plan(name: str, option: str) -> dict:
    """Compiles one step from abstract arguments and returns its memory in bytes, its work, and the seconds of compiling.

    The work is XLA's own account of the program: `flops`, and `bytes` that its kernels read and write. XLA counts the body of a
    loop once, so both are multiplied by the number of microbatches; what stands outside the loop, the update, is small
    in comparison.
    """
    found = re.fullmatch(r"(float32|bfloat16|remat|bfloat16\+remat)(?:\+a(\d+))?", option)
    if found is None:
        raise SystemExit(f"unknown option {option}\n{__doc__}")
    own = {"dtype": jnp.bfloat16 if "bfloat16" in option else jnp.float32, "remat": "remat" in option}
    program = programs(name, accumulation=int(found[2] or 0) or None, **own)
    began = time.perf_counter()
    try:
        compiled = program.step.lower(*program.step_arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if not (used := too_large(error)):
            raise
        return {"too_large": used, "images": 2 * program.images}
    memory, work = compiled.memory_analysis(), compiled.cost_analysis()
    whole = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return {
        "images": 2 * program.images,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "all": whole + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "flops": work["flops"] * program.accumulation,
        "bytes": work["bytes accessed"] * program.accumulation,
        "seconds": time.perf_counter() - began,
    }


def too_large(error: Exception) -> str:
    """Returns what the compiler says of a step that does not fit the device, such as "Used 20.1G of 15.7G"; else ""."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        return ""
    used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w)", str(error))
    return used[0] if used else str(error)[:200]


def plan_for(topology: str) -> None:
    """Makes every pmap from here on one for the first chip of a TPU topology, such as v5e:2x2; none need be there."""
    from jax.experimental import topologies

    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    jax.pmap = functools.partial(jax.pmap, devices=chips[:1])


def main(cells: list[str]) -> None:
    # Buffers are assigned before machine code is made, so that may be made in a hurry.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
    # A program from the persistent cache has no plan to look at.
    jax.config.update("jax_enable_compilation_cache", False)
    if cells and cells[0].startswith("--tpu="):
        plan_for(cells.pop(0).removeprefix("--tpu="))
    sizes = "arguments, GiB", "temporaries, GiB", "in all, GiB"
    shown = Table("memory_plans", "config", "option", "images per microbatch", *sizes)
    for cell in cells or [f"{name}:{option}" for name, options in TABLE.items() for option in options]:
        name, _, option = cell.partition(":")
        for each in [option] if option else TABLE[name]:
            row = plan(name, each)
            if "too_large" in row:
                planned = ["", "does not fit", row["too_large"]]
            else:
                planned = [f"{row[part] / GIB:.2f}" for part in ("arguments", "temporaries", "all")]
            shown.add(name, each, str(row["images"]), *planned)


if __name__ == "__main__":
    main(sys.argv[1:])
