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

import dataclasses
import functools
import importlib.util
import os
import re
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from retrack_jax.config.options import Options
from retrack_jax.config.reading import read_config
from retrack_jax.diffusion import Schedule, make_eps_fn
from retrack_jax.models.unet2d import UNet2D
from retrack_jax.train.state import create_state
from retrack_jax.train.step import Shared, make_train_step
from retrack_jax.unlearn.methods import get_method
from tests.benchmarks.full_size import NETWORKS
from tests.benchmarks.measure import Table

GIB = 2**30
TABLE = {
    "digits_tshirt": ("float32", "bfloat16", "remat", "float32+a4"),
    "mnist_tshirt": ("float32", "bfloat16", "remat", "float32+a4"),
    "cifar10": ("float32", "bfloat16", "remat", "float32+a4"),
    "celebahq": ("float32", "bfloat16", "remat", "bfloat16+remat"),
}


def options_of(name: str) -> Options:
    """Returns the options of `configs/NAME.py`."""
    path = Path(__file__).parents[2] / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return read_config(module.get_config())


def array(*shape: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def plan(name: str, option: str) -> dict:
    """Compiles one step from abstract arguments and returns its memory in bytes, its work, and the seconds of compiling.

    The work is XLA's own account of the program: `flops`, and `bytes` that its kernels read and write. XLA counts the body of a
    loop once, so both are multiplied by the number of microbatches; what stands outside the loop, the update, is small beside it.
    """
    options, method = options_of(name), get_method("retrack")
    recipe = options.recipe("retrack")
    found = re.fullmatch(r"(float32|bfloat16|remat|bfloat16\+remat)(?:\+a(\d+))?", option)
    if found is None:
        raise SystemExit(f"unknown option {option}\n{__doc__}")
    recipe = dataclasses.replace(recipe, accumulation=int(found[2] or recipe.accumulation))
    fields = {"dtype": jnp.bfloat16 if "bfloat16" in option else jnp.float32, "remat": "remat" in option}
    unet = UNet2D.from_config(NETWORKS.get(name) or dataclasses.asdict(options.model), **fields)
    schedule = Schedule.create()
    image = (unet.sample_size, unet.sample_size, unet.in_channels)
    x, t = jnp.zeros((1, *image)), jnp.zeros((1,), jnp.int32)
    optimizer = recipe.optimizer()
    state = jax.eval_shape(lambda: create_state(unet.init(jax.random.key(0), x, t)["params"], optimizer))
    batch = {"remain": {"pixels": array(1, recipe.batch_size, *image, dtype=jnp.uint8)}}
    batch |= {part: array(1, recipe.batch_size) for part in ("remain_index", "forget_row", "forget_index")}
    shared = Shared(
        schedule=jax.eval_shape(lambda: schedule),
        forget={"pixels": array(1, *image, dtype=jnp.uint8)},
        neighbors={"pixels": array(recipe.num_neighbors, *image, dtype=jnp.uint8)},
        neighbor_rows=array(1, recipe.num_neighbors),
    )
    how = recipe.step_options(schedule.num_train_timesteps, dropout=False)
    p_step = make_train_step(method, make_eps_fn(unet.apply, schedule), how)
    began = time.perf_counter()
    try:
        compiled = p_step.lower(state, batch, shared, jax.eval_shape(lambda: jax.random.key(0))).compile()
    except jax.errors.JaxRuntimeError as error:
        if not (used := too_large(error)):
            raise
        return {"too_large": used, "images": 2 * recipe.batch_size // recipe.accumulation}
    memory, work = compiled.memory_analysis(), compiled.cost_analysis()
    whole = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return {
        "images": 2 * recipe.batch_size // recipe.accumulation,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "all": whole + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "flops": work["flops"] * recipe.accumulation,
        "bytes": work["bytes accessed"] * recipe.accumulation,
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
