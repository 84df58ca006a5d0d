"""Seconds until a user sees something: import of the package, `--help`, and the first training step with a cold and a
warm cache.

    .venv-parity/bin/python -m tests.benchmarks.startup [--networks digits cifar10]

The first step is timed from the start of a new Python process to the end of its first ReTrack step: imports, weights, tracing,
and compiling or reading the cache. Weights are those that the config begins with: random ones of the digits, which it
pretrains, and a diffusers checkpoint of CIFAR-10. PyTorch's eager step is started the same way beside it. The disk's cache is
warm in all of them.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time

from tests.benchmarks.measure import Table, parser_of

STEP = """
if "{side}" == "ours":  # as the command does
    from retrack_jax.cli.huge_pages import restart_with_huge_pages
    restart_with_huge_pages()
from tests.benchmarks.{side} import make_training
make_training("{network}", "retrack", checkpoint={checkpoint!r})()
"""
WRITE = """
from tests.benchmarks.ours import write_checkpoint
write_checkpoint("{network}", {checkpoint!r})
"""


def seconds(command: list[str], environment: dict[str, str] | None = None) -> float:
    """Returns how long `command` takes; raises if it fails."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | (environment or {}))
    return time.perf_counter() - start


def first_step(network: str, rounds: int) -> dict[str, float]:
    """Returns seconds from command to first step: ours with a cold and a warm cache, PyTorch's."""
    with tempfile.TemporaryDirectory() as cache:
        checkpoint = None if network == "digits" else f"{cache}/checkpoint"
        if checkpoint:
            seconds([sys.executable, "-c", WRITE.format(network=network, checkpoint=checkpoint)], {"JAX_PLATFORMS": "cpu"})
        ours, theirs = (
            [sys.executable, "-c", STEP.format(side=side, network=network, checkpoint=checkpoint)] for side in ("ours", "theirs")
        )
        with_cache = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PLATFORMS": "cpu"}
        with_cache["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"  # as cli/process.py sets it
        cold = seconds(ours, with_cache)
        pairs = [(seconds(ours, with_cache), seconds(theirs)) for _ in range(rounds)]
    warm, pytorch = (statistics.median(side) for side in zip(*pairs, strict=True))
    return {"cold_cache": cold, "warm_cache": warm, "pytorch": pytorch}


def startup(networks: list[str], rounds: int = 3) -> dict:
    """Returns the seconds of everything that this module measures."""
    commands = {"import": ["-c", "import retrack_jax.api"], "help": ["-m", "retrack_jax.main", "--help"]}
    commands = {name: [sys.executable, *command] for name, command in commands.items()}
    found = {name: statistics.median(seconds(command) for _ in range(rounds)) for name, command in commands.items()}
    return found | {"first_step": {network: first_step(network, rounds) for network in networks}}


def table(found: dict) -> Table:
    """Returns the seconds, printed."""
    shown = Table("speed_startup", "from command to", "ours, s", "ours with a cold cache, s", "PyTorch, s")
    for name in ("import", "help"):
        shown.add(name, f"{found[name]:.2f}", "", "")
    for network, row in found["first_step"].items():
        shown.add(f"first step, {network}", *(f"{row[kind]:.1f}" for kind in ("warm_cache", "cold_cache", "pytorch")))
    return shown


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--networks", nargs="*", default=["digits", "cifar10"])
    arguments = parser.parse_args()
    table(startup(arguments.networks)).write(arguments.results, "python -m tests.benchmarks.startup")


if __name__ == "__main__":
    main()
