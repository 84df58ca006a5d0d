"""One side of a measurement in a process of its own: `python -m tests.benchmarks.worker SPEC`, driven over stdin by measure.py.

SPEC is JSON: `side` ("ours" or "theirs"), `job` (a `make_*` of that module, without the prefix) and its keyword
arguments. After building and two first calls it prints one JSON line; then for each line it reads it runs twice and prints
the seconds that the second took. The first of the two brings the process back: while the other side ran, its memory may have
gone (a virtual machine takes a sleeping process's pages, and clears them again when it wakes), and its caches have.
"""

import importlib
import json
import os
import sys
import time

from retrack_jax.cli.huge_pages import restart_with_huge_pages
from tests.benchmarks.measure import forget_peak, peak_resident_bytes


def main() -> None:
    spec = json.loads(sys.argv[1])
    side, job = spec.pop("side"), spec.pop("job")
    if side == "ours":
        restart_with_huge_pages()  # as the command does
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", spec.pop("num_devices", 1))
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/retrack_jax/benchmarks"))
    else:
        import torch

        # As XLA does by itself. Without it numbers of SISS become denormal after some steps, which then take up to ten times as
        # long.
        torch.set_flush_denormal(True)
    start = time.perf_counter()
    run = getattr(importlib.import_module(f"tests.benchmarks.{side}"), f"make_{job}")(**spec)
    built = time.perf_counter()
    run()
    first = time.perf_counter() - built
    run()  # autotuning, allocators and caches settle in the second call; said only then, so that no turn of the other meets it
    forget_peak()
    print(json.dumps({"build_seconds": built - start, "first_seconds": first}), flush=True)
    for _ in sys.stdin:
        run()
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        print(json.dumps(seconds | {"peak_bytes": peak_resident_bytes()}), flush=True)


if __name__ == "__main__":
    main()
