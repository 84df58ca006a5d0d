"""Calls of the compiled program: which steps each takes, its batch, and its metrics step by step.

A call returns the metrics of each of its steps, so the log has the same lines for any number of them. No call reaches past a
save, so the same steps are saved. A run that is asked to stop does so after a call. Results are those of single steps up to
rounding: often to the bit, but the compiler may order the sums of a loop's body in another way.
"""

from collections.abc import Callable, Iterator

import jax
import numpy as np

from retrack_jax.notation import PyTree


def calls_of(start: int, stop: int, steps_per_call: int, checkpoint_every: int) -> Iterator[range]:
    """Yields the steps of each call from `start` to `stop`, numbered from 0.

    A call takes `steps_per_call` of them. Where fewer are left before the next save or `stop`, calls take one, because any other
    number would be another program to compile. With `checkpoint_every` 0 the only save is at `stop`.
    """
    step = start
    while step < stop:
        seam = min(stop, (step // checkpoint_every + 1) * checkpoint_every) if checkpoint_every else stop
        count = steps_per_call if step + steps_per_call <= seam else 1
        yield range(step, step + count)
        step += count


def batch_of(call: range, batches: Callable[[int], PyTree]) -> PyTree:
    """Returns what a call takes, of `step -> batch`: leaves `[D, b, ...]` for one step, `[D, steps, b, ...]` for several."""
    if len(call) == 1:
        return batches(call.start)
    return jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *map(batches, call))


def by_step(call: range, metrics: dict) -> Iterator[tuple[int, dict]]:
    """Yields the number of steps done and the metrics of that step, for each step of a call that returned `metrics`."""
    for index, step in enumerate(call):
        yield step + 1, metrics if len(call) == 1 else {key: values[index] for key, values in metrics.items()}
