"""A trace of a few training steps by jax's profiler, for Perfetto or TensorBoard."""

from collections.abc import Iterable, Iterator

import jax

_FIRST = 2  # the first step compiles, and the second may wait for it


def profiled(steps: Iterable[int], folder, count: int) -> Iterator[int]:
    """Yields `steps`, and records `count` of them (0: none) into `folder`, from the third on. Close it to end an open trace."""
    recording = False
    try:
        for index, step in enumerate(steps):
            if count and index == _FIRST:
                jax.profiler.start_trace(str(folder))
                recording = True
            yield step
            if recording and index == _FIRST + count - 1:
                _stop()
                recording = False
    finally:
        if recording:
            _stop()


def _stop() -> None:
    jax.block_until_ready(jax.live_arrays())  # the device may be steps behind
    jax.profiler.stop_trace()
