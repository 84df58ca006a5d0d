"""What a step on CPU is made of, where the whole step does not show it: seconds of single parts, printed.

    python -m tests.benchmarks.parts gradients            # of kernels: XLA's direct form and Winograd's in strips
    python -m tests.benchmarks.parts update [DEVICES]     # averaging and applying gradients, whatever the batch
    python -m tests.benchmarks.parts attention            # jax's form and the CPU's own
    python -m tests.benchmarks.parts start                # from a new process to the first step; run it twice for a warm cache
    python -m tests.benchmarks.parts microbatches         # one step in 1, 2, 4, ... parts, and its memory
    python -m tests.benchmarks.parts flags                # one step of pretraining under flags of XLA, in turns

Gradients, update and start are of CIFAR-10's step.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from retrack_jax import parallel
from retrack_jax.models.cpu import attention as cpu
from retrack_jax.models.cpu import winograd
from tests.benchmarks.measure import Table, Worker, in_turns, once

BEGAN = time.perf_counter()
# Images, pixels per side, channels in and out.
SHAPES = ((1, 256, 128, 128), (2, 256, 256, 128), (2, 128, 128, 128), (16, 32, 128, 128), (16, 32, 256, 128), (16, 16, 256, 256))
SAME = ((1, 1), (1, 1))


def seconds(call: Callable, *arguments, rounds: int = 5) -> list[float]:
    """Returns how long `call(*arguments)` takes each time, after one call that compiles."""
    jax.block_until_ready(call(*arguments))
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        found.append(time.perf_counter() - began)
    return found


def gradients() -> None:
    """Prints the least milliseconds of both forms of the kernel gradient (models/cpu/conv.py (3), models/cpu/winograd.py (2))."""

    def direct(x, dy):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3), (1, 1), SAME, dimension_numbers=numbers
        ).transpose(1, 2, 0, 3)

    print("| kernel gradient | direct, ms | Winograd in strips, ms |\n|---|---|---|")
    for images, side, channels, features in SHAPES:
        x = jax.random.normal(jax.random.key(0), (images, side, side, channels))
        dy = jax.random.normal(jax.random.key(1), (images, side, side, features))
        least = [1e3 * min(seconds(jax.jit(form), x, dy)) for form in (direct, winograd.kernel_gradient)]
        print(f"| {images} of {side} x {side}, {channels} to {features} | {least[0]:.0f} | {least[1]:.0f} |", flush=True)


def update(devices: int = 2) -> None:
    """Prints the median seconds of averaging gradients over devices, of the optimizer, and of both."""
    jax.config.update("jax_num_cpu_devices", devices)
    from tests.benchmarks.ours import make_module, make_state

    parts = {
        "neither": lambda state, grad: state.replace(params=grad),
        "average": lambda state, grad: state.replace(params=parallel.pmean(grad)),
        "optimizer": lambda state, grad: state.apply_gradients(grad),
        "both": lambda state, grad: state.apply_gradients(parallel.pmean(grad)),
    }
    for name, part in parts.items():
        state, ones = make_state("cifar10", make_module("cifar10")[1]), np.ones(devices, np.float32)
        p_part = parallel.pmap(
            lambda state, one, part=part: part(state, jax.tree.map(lambda leaf: leaf * one, state.params)),
            in_axes=(None, 0),
            donate_argnums=(0,),
        )

        def run(p_part=p_part, ones=ones):
            nonlocal state
            state = p_part(state, ones)
            return state

        print(f"{devices} devices, {name}: {statistics.median(seconds(run, rounds=8)):.3f} s", flush=True)


# Images, tokens, heads and channels per head of an attention in: the small digits, MNIST, CIFAR-10, DiT-XL/2, Stable Diffusion.
ATTENTIONS = ((64, 16, 8, 8), (8, 196, 8, 8), (8, 256, 1, 256), (2, 256, 16, 72), (1, 4096, 8, 40))


def attention() -> None:
    """Prints the median milliseconds of both forms of attention in float32, alone and with its gradient, on one device."""
    columns = "jax's", "models/cpu", "jax's, with gradient", "models/cpu, with gradient"
    table = Table("attention_cpu", "images of tokens, heads of channels", *(f"{column}, ms" for column in columns))
    for images, tokens, heads, width in ATTENTIONS:
        rngs = jax.random.split(jax.random.key(0), 4)
        arrays = [jax.random.normal(rng, (images, tokens, heads, width)) for rng in rngs]
        forms = [jax.jit(form) for form in (jax.nn.dot_product_attention, cpu.attend)]
        both = [jax.jit(lambda *qkvc, form=form: jax.vjp(form, *qkvc[:3])[1](qkvc[3])) for form in forms]
        found = [seconds(form, *arrays[:3], rounds=10) for form in forms] + [seconds(form, *arrays, rounds=10) for form in both]
        table.add(f"{images} of {tokens}, {heads} of {width}", *(f"{1e3 * statistics.median(each):.2f}" for each in found))


# Images in each of the two batches of a step of ReTrack, and in how many parts they are taken.
MICROBATCHES = {
    "digits": (64, (1, 4, 8)),
    "mnist5k_tshirt": (128, (1, 4, 8, 16)),
    "cifar10": (8, (1, 2, 4)),
}


def microbatches() -> None:
    """Prints the seconds of a step on two devices, and the memory of its process, over the number of its microbatches."""
    table = Table("speed_microbatches", "network", "microbatches", "images at once on a device", "s a step", "GiB")
    for network, (images, numbers) in MICROBATCHES.items():
        for parts in numbers:
            same = {"network": network, "method": "retrack", "batch": (images, images), "num_devices": 2}
            row = once("ours", "training", accumulation=parts, **same)
            table.add(network, f"{parts}", f"{images // parts}", f"{row['seconds']:.2f}", f"{row['peak_bytes'] / 2**30:.2f}")


_YNN = "--xla_cpu_experimental_ynn_fusion_type"
FLAGS = (
    "",
    "--xla_cpu_prefer_vector_width=512",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_experimental_onednn_custom_call=true",
    f"{_YNN}=LIBRARY_FUSION_TYPE_DOT",
    f"{_YNN}=LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE",
    f"{_YNN}=LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE,LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION",
)


def flags() -> None:
    """Prints the seconds of a step of 32 real digits on two devices under XLA's flags, in turns."""
    same = {"network": "mnist5k_tshirt", "method": "vanilla", "batch": (32, 32), "num_devices": 2}
    workers = {}
    for flag in FLAGS:
        os.environ["XLA_FLAGS"] = flag
        workers[flag] = Worker("ours", "training", **same)
    found = in_turns(workers, 5)
    table = Table("speed_flags", "XLA_FLAGS", "s a step", "times as long as without")
    for flag, row in found.items():
        shown = f"`{flag.replace('LIBRARY_FUSION_TYPE_', '')}`" if flag else "none"
        table.add(shown, f"{row['seconds']:.3f}", f"{row['seconds'] / found['']['seconds']:.2f}")


def start() -> None:
    """Prints the seconds of each stretch on the way to the first step; programs are kept in a cache of this benchmark's own."""
    kept = Path("~/.cache/retrack_jax/benchmarks").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(kept))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    began = BEGAN

    def lap(name: str) -> None:
        nonlocal began
        now = time.perf_counter()
        print(f"{name}: {now - began:.1f} s", flush=True)
        began = now

    from retrack_jax.checkpoints import import_diffusers
    from tests.benchmarks.ours import BATCH, make_data, make_state, make_step, write_checkpoint

    lap("imports")
    if not (kept / "cifar10").exists():
        write_checkpoint("cifar10", kept / "cifar10")
        lap("a checkpoint for the next time too")
    module, params = import_diffusers(kept / "cifar10")
    lap("reading the checkpoint")
    batch, shared = make_data("cifar10", *BATCH["cifar10"])
    state, rng = make_state("cifar10", params), parallel.replicate(jax.random.key(1))
    lap("state and data")
    lowered = make_step(module, "cifar10", "retrack", accumulation=2).lower(state, batch, shared, rng)
    lap("tracing and lowering")
    compiled = lowered.compile()
    lap("compiling, or reading the cache")
    jax.block_until_ready(compiled(state, batch, shared, rng))
    lap("the step")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    part, *rest = sys.argv[1:] or [""]
    parts = {one.__name__: one for one in (gradients, update, attention, start, microbatches, flags)}
    if part not in parts:
        sys.exit(__doc__)
    parts[part](*map(int, rest))
