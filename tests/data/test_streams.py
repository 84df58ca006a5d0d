"""Streams: every process and device gets rows of its own, together one batch; a step's rows do not hang on where a run starts."""

import jax
import numpy as np
import pytest

from retrack_jax import parallel
from retrack_jax.data.batches import Batches, rows_at
from retrack_jax.data.in_order import in_order


def batches(seed=0, size=16):
    images = np.arange(100, dtype=np.uint8)[:, None]
    return Batches(
        gather=lambda rows: {"pixels": images[rows]},
        num_remain=100,
        forget_rows=np.array([0, 0, 1]),
        remain_size=size,
        forget_size=16,
        seed=seed,
    )


def rows(batch):
    return parallel.unshard_batch(batch)["remain"]["pixels"][:, 0].tolist()


@pytest.fixture
def as_process(monkeypatch):
    """Makes jax say that this is process `index` of `count`; the rows are then this process's own."""

    def be(index, count):
        monkeypatch.setattr(jax, "process_index", lambda: index)
        monkeypatch.setattr(jax, "process_count", lambda: count)

    return be


def test_devices_of_one_batch_see_different_images():
    pixels = batches()(3)["remain"]["pixels"]
    assert pixels.shape[0] == jax.local_device_count() == 4
    assert len(np.unique(pixels)) == 16


@pytest.mark.parametrize("count", [2, 4])
def test_processes_see_different_images_and_together_the_batch_of_one(as_process, count):
    whole = batches()(5)
    parts = []
    for index in range(count):
        as_process(index, count)
        parts.append(parallel.unshard_batch(batches()(5)))
    as_process(0, 1)
    assert sum((part["remain"]["pixels"][:, 0].tolist() for part in parts), []) == rows(whole)
    assert len({value for part in parts for value in part["remain"]["pixels"][:, 0].tolist()}) == 16
    for name in ("remain_index", "forget_index", "forget_row"):
        joined = np.concatenate([part[name] for part in parts])
        np.testing.assert_array_equal(joined, parallel.unshard_batch(whole)[name])


def test_a_resumed_stream_goes_on_with_the_same_images():
    through = [rows(batch) for batch in in_order(batches(), range(12), ahead=2)]
    resumed = [rows(batch) for batch in in_order(batches(), range(7, 12), ahead=2)]
    assert resumed == through[7:]


def test_the_seed_of_a_run_orders_its_batches():
    """The official sampler always has seed 0: its seeds do not change the order."""
    first, second = batches(seed=0)(5), batches(seed=1)(5)
    assert rows(first) == rows(batches(seed=0)(5)) and rows(first) != rows(second)
    forgets = [np.concatenate([batches(seed=seed)(step)["forget_row"].ravel() for step in range(4)]) for seed in (0, 1)]
    assert (forgets[0] != forgets[1]).any()


def test_the_seed_the_stream_and_the_epoch_change_the_order():
    first = rows_at(100, 0, 0, 0, count=100)
    others = [rows_at(100, *where, count=100) for where in ((1, 0, 0), (0, 1, 0), (0, 0, 100))]
    assert all(sorted(rows) == list(range(100)) for rows in (first, *others))
    assert all((other != first).any() for other in others)
