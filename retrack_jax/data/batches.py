"""Seeded batches, addressed by step: a resumed run sees the batches that it would have seen.

The order is a function of (seed, stream, epoch) and nothing else, so there is no iterator to save. Each process takes its own
rows of the global batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from retrack_jax import parallel
from retrack_jax.notation import PyTree


def rows_at(num_items: int, seed: int, stream: int, start: int, count: int) -> np.ndarray:
    """Returns the items at positions `start` to `start + count` of an endless stream of epochs over `num_items`, int64 `[count]`.

    Each epoch is in a fresh order that `seed` and `stream` decide.
    """
    epochs, offsets = np.divmod(np.arange(start, start + count), num_items)
    rows = np.empty(count, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = _permutation(num_items, seed, stream, int(epoch))[offsets[here]]
    return rows


@lru_cache(maxsize=8)
def _permutation(num_items: int, seed: int, stream: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, stream, epoch]).permutation(num_items)


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Makes this process's part of the global batch of any step.

    Attributes:
      gather: `rows -> {name: array [b, ...]}`, reads remaining images in the form that `data.dataset.to_x_0` takes; None if
        the method has no remain stream.
      num_remain: remaining images.
      forget_rows: int `[F]`, for each forgotten image its row of what train/step.py holds on the device (copies share one), or
        None.
      remain_size, forget_size: global batch sizes; 0 leaves the stream out.
      seed: decides the order of both streams.
    """

    gather: Callable[[np.ndarray], dict[str, np.ndarray]] | None
    num_remain: int
    forget_rows: np.ndarray | None = None
    remain_size: int
    forget_size: int = 0
    seed: int

    def __call__(self, step: int) -> PyTree:
        """Returns the batch of `step` with a device axis: what train/step.py takes."""
        batch = {}
        if self.remain_size:
            batch["remain_index"], rows = self._rows(step, 0, self.num_remain, self.remain_size)
            batch["remain"] = self.gather(rows)
        if self.forget_size:
            batch["forget_index"], rows = self._rows(step, 1, len(self.forget_rows), self.forget_size)
            batch["forget_row"] = self.forget_rows[rows].astype(np.int32)
        return parallel.shard_batch(batch)

    def _rows(self, step: int, stream: int, num_items: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        local = parallel.local_rows(size)
        rows = rows_at(num_items, self.seed, stream, step * size, size)
        return np.arange(size, dtype=np.int32)[local], rows[local]
