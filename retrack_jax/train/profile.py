"""A trace of a few training steps by jax's profiler, for Perfetto or TensorBoard."""

import contextlib
from collections.abc import Iterable, Iterator

import jax

_FIRST = 2  # the first step compiles, and the second may wait for it


def profiled(steps: Iterable[int], folder, count: int) -> Iterator[int]:
    """Yields `steps`, and records `count` of them (0: none) into `folder`, from the third on. Close it to end an open trace."""
    with contextlib.ExitStack() as trace:
        for index, step in enumerate(steps):
            if count and index == _FIRST:
                jax.profiler.start_trace(str(folder))
                trace.callback(_stop)
            yield step
            if index == _FIRST + count - 1:
                trace.close()


def _stop() -> None:
    jax.block_until_ready(jax.live_arrays())  # the device may be steps behind
    jax.profiler.stop_trace()
