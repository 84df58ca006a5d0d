"""What a step on CPU is made of, where the whole step does not show it; the machine should do nothing else.

    python -m tests.benchmarks.parts microbatches [--results=docs/results]    # one step in 1, 2, 4, ... parts, and its memory
    python -m tests.benchmarks.parts pages [...]          # one step with pages of 4 KiB and of 2 MiB, in turns
    python -m tests.benchmarks.parts flags [...]          # one step of pretraining under flags of XLA, in turns
    python -m tests.benchmarks.parts update               # averaging and applying gradients, whatever the batch
    python -m tests.benchmarks.parts start                # from a new process to the first step; run it twice for a warm cache

Pages, update and start are of CIFAR-10's step. One convolution or attention at a time: convolutions.py.
"""

import os
import statistics
import time
from pathlib import Path

import jax
import numpy as np

from retrack_jax import parallel
from retrack_jax.cli.huge_pages import TUNABLE
from tests.benchmarks.convolutions import seconds
from tests.benchmarks.measure import Table, Worker, in_turns, once, parser_of

BEGAN = time.perf_counter()
COMMAND = "python -m tests.benchmarks.parts"


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

        print(f"{devices} devices, {name}: {statistics.median(wall for wall, _ in seconds(run, rounds=8)):.3f} s", flush=True)


# Images in each of the two batches of a step of ReTrack, and in how many parts they are taken.
MICROBATCHES = {
    "digits": (64, (1, 4, 8)),
    "mnist5k_tshirt": (128, (1, 4, 8, 16)),
    "cifar10": (8, (1, 2, 4)),
}


def microbatches() -> Table:
    """Returns the seconds of a step on two devices, and the memory of its process, over the number of its microbatches."""
    table = Table("speed_microbatches", "network", "microbatches", "images at once on a device", "s a step", "GiB")
    for network, (images, numbers) in MICROBATCHES.items():
        for parts in numbers:
            same = {"network": network, "method": "retrack", "batch": (images, images), "num_devices": 2}
            row = once("ours", "training", accumulation=parts, **same)
            table.add(network, f"{parts}", f"{images // parts}", f"{row['seconds']:.2f}", f"{row['peak_bytes'] / 2**30:.2f}")
    return table


def pages() -> Table:
    """Returns the seconds of a step of CIFAR-10 on one device, by the clock and of both cores, without huge pages and with."""
    same = {"network": "cifar10", "method": "retrack"}
    table, workers = Table("huge_pages", "pages of", "wall, s", "processors, s", "GiB"), {}
    for name, huge in (("4 KiB", 0), ("2 MiB", 1)):
        os.environ["GLIBC_TUNABLES"] = f"{TUNABLE}={huge}"
        workers[name] = Worker("ours", "training", **same)
    for name, row in in_turns(workers, 6).items():
        table.add(name, f"{row['seconds']:.2f}", f"{row['cpu_seconds']:.2f}", f"{row['peak_bytes'] / 2**30:.2f}")
    return table


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


def flags() -> Table:
    """Returns the seconds of a step of 32 real digits on two devices under XLA's flags, in turns."""
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
    return table


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


PARTS = {one.__name__: one for one in (microbatches, pages, flags, update, start)}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("part", choices=PARTS)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    if table := PARTS[options.part]():
        table.write(options.results, f"{COMMAND} {options.part}")


if __name__ == "__main__":
    main()
