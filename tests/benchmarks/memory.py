"""Memory of one ReTrack step of a config on one device, as the compiler plans it; nothing is run and no weights are made.

    python -m tests.benchmarks.memory [CONFIG[:OPTION] ...]      # such as celebahq:remat; without arguments the whole table

CONFIG: digits_tshirt, mnist_tshirt, cifar10, celebahq (stable_diffusion: sd_memory.py). OPTION: float32, bfloat16, remat,
bfloat16+remat, and any of these with +aN for N microbatches a step in place of the config's number. Batch sizes, K and
microbatches are the config's own; the networks of cifar10 and celebahq are those of their checkpoints.

The figures are XLA's buffer assignment for the backend at hand: arguments (parameters, AdamW's two moments, the batch), which are
updated in place, and temporaries (gradients and activations). The CPU's compiler does not schedule for memory and takes
convolutions in another way than an accelerator's, so from there they are upper figures, good for comparing options.
"""

import importlib.util
import os
import re
import sys
import time
from pathlib import Path

# Buffers are assigned before machine code is made, so that may be made in a hurry.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import jax
import jax.numpy as jnp

from retrack_jax import build
from retrack_jax.diffusion import Schedule, make_eps_fn
from retrack_jax.models.unet2d import UNet2D
from retrack_jax.train.state import create_state
from retrack_jax.train.step import Shared, make_train_step
from retrack_jax.unlearn.methods import get_method
from tests.benchmarks.full_size import NETWORKS

GIB = 2**30
TABLE = {
    "digits_tshirt": ("float32", "bfloat16", "remat", "float32+a4"),
    "mnist_tshirt": ("float32", "bfloat16", "remat", "float32+a4"),
    "cifar10": ("float32", "bfloat16", "remat", "float32+a4"),
    "celebahq": ("float32", "bfloat16", "remat", "bfloat16+remat"),
}
HEADER = "| config | option | images a microbatch | arguments, GiB | temporaries, GiB | sum, GiB |\n|---|---|---|---|---|---|"


def config_of(name: str):
    """Returns the fields of `configs/NAME.py`."""
    path = Path(__file__).parents[2] / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def array(*shape: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def plan(name: str, option: str) -> dict:
    """Compiles one step from abstract arguments and returns its memory in bytes, and the seconds of compiling."""
    config, method = config_of(name), get_method("retrack")
    recipe = config.unlearn
    found = re.fullmatch(r"(float32|bfloat16|remat|bfloat16\+remat)(?:\+a(\d+))?", option)
    if found is None:
        raise SystemExit(f"unknown option {option}\n{__doc__}")
    recipe.accumulation = int(found[2] or recipe.accumulation)
    fields = {"dtype": jnp.bfloat16 if "bfloat16" in option else jnp.float32, "remat": "remat" in option}
    unet = UNet2D.from_config(NETWORKS.get(name) or config.model.to_dict(), **fields)
    schedule = Schedule.create()
    image = (unet.sample_size, unet.sample_size, unet.in_channels)
    x, t = jnp.zeros((1, *image)), jnp.zeros((1,), jnp.int32)
    optimizer = build.optimizer_from(recipe)
    state = jax.eval_shape(lambda: create_state(unet.init(jax.random.key(0), x, t)["params"], optimizer))
    batch = {"remain": {"pixels": array(1, recipe.batch_size, *image, dtype=jnp.uint8)}}
    batch |= {part: array(1, recipe.batch_size) for part in ("remain_index", "forget_row", "forget_index")}
    shared = Shared(
        schedule=jax.eval_shape(lambda: schedule),
        forget={"pixels": array(1, *image, dtype=jnp.uint8)},
        neighbors={"pixels": array(recipe.num_neighbors, *image, dtype=jnp.uint8)},
        neighbor_rows=array(1, recipe.num_neighbors),
    )
    how = build.unlearn_options_from(recipe, method, schedule.num_train_timesteps, dropout=False)
    p_step = make_train_step(method, make_eps_fn(unet.apply, schedule), how)
    began = time.perf_counter()
    memory = p_step.lower(state, batch, shared, jax.eval_shape(lambda: jax.random.key(0))).compile().memory_analysis()
    return {
        "images": 2 * recipe.batch_size // recipe.accumulation,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "sum": memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        "seconds": time.perf_counter() - began,
    }


def main(cells: list[str]) -> None:
    # A program from the persistent cache has no plan to look at.
    jax.config.update("jax_enable_compilation_cache", False)
    print(HEADER, flush=True)
    for cell in cells or [f"{name}:{option}" for name, options in TABLE.items() for option in options]:
        name, _, option = cell.partition(":")
        for each in [option] if option else TABLE[name]:
            row = plan(name, each)
            sizes = " | ".join(f"{row[part] / GIB:.2f}" for part in ("arguments", "temporaries", "sum"))
            print(f"| {name} | {each} | {row['images']} | {sizes} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
