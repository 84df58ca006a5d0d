"""Work that threads do ahead of what needs it, in order: batches while a step runs, pictures while others are decoded."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")


def in_order(work: Callable[[Item], Value], items: Iterable[Item], *, ahead: int, workers: int = 1) -> Iterator[Value]:
    """Yields `work(item)` for each of `items`, in their order, and raises what it raises.

    `workers` threads do the work; up to `ahead` items are taken before their turn, so as many results may wait.
    """
    items = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        pending = deque(pool.submit(work, item) for item in islice(items, ahead))
        try:
            while pending:
                value = pending.popleft().result()
                pending.extend(pool.submit(work, item) for item in islice(items, 1))
                yield value
        finally:
            for future in pending:
                future.cancel()
