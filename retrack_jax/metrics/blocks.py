"""Many images through a network: in calls of so few that memory depends on neither their number nor their size, with progress."""

import functools
from collections.abc import Callable

import jax
import numpy as np

from retrack_jax import parallel
from retrack_jax.checks import check_int
from retrack_jax.log import progress
from retrack_jax.notation import Array, PyTree

MOST_IMAGES = 256
MOST_PIXELS = MOST_IMAGES * 32 * 32


def images_per_call(image_shape: tuple[int, ...]) -> int:
    """Returns how many images `(H, W, C)` a call takes: 256 of up to 32 x 32, as many pixels of larger ones, and at least one."""
    return min(MOST_IMAGES, max(1, MOST_PIXELS // (image_shape[0] * image_shape[1])))


def shown_progress(desc: str, total: int):
    """Returns a progress bar over `total` images, to be updated by hand; with an empty `desc` it shows nothing."""
    return progress([], desc, total=total, is_main=bool(desc) and parallel.is_main_process(), unit="img")


@functools.lru_cache(maxsize=32)
def mapped(function: Callable, in_axes: tuple[int | None, ...], **static) -> Callable:
    """Returns `function` with the keyword arguments `static`, mapped over devices; the same arguments give the same program."""
    return parallel.pmap(functools.partial(function, **static), in_axes=in_axes, out_axes=0)


def condition_of(conditions: PyTree, rows: Array) -> tuple[Array, ...]:
    """Returns what a network takes as the condition of the images `rows` `[B]`: nothing, `[B, ...]`, or `[1, ...]` for all.

    `conditions` are those of all images, leaves `[N, ...]`, or one for all, `[1, ...]`; None: the network is unconditional.
    """
    if conditions is None:
        return ()
    return (jax.tree.map(lambda leaf: leaf if leaf.shape[0] == 1 else leaf[rows], conditions),)


def in_blocks(
    score: Callable[[np.ndarray], Array], total: int, image_shape: tuple[int, ...], size: int | None = None, desc: str = ""
) -> np.ndarray:
    """Returns the scores of 0, ..., `total` - 1, `[total, ...]`; devices and processes share the work.

    Args:
      score: `score(numbers int32 [D, b]) -> [D, b, ...]`, mapped over the D devices of this process. Each score may depend only
        on its number.
      total: how many numbers there are.
      image_shape: (H, W, C) of the image behind each number.
      size: the most numbers per device and call; None takes `images_per_call`. All blocks have the same shape, so that one
        program is compiled; the last block is filled up with the first numbers.
      desc: the label of the progress bar over this process's share; without it there is none.
    """
    size = images_per_call(image_shape) if size is None else size
    check_int("batch_size", size, 1)
    devices = jax.local_device_count()

    def of_share(first: int, stop: int) -> dict[str, np.ndarray]:
        count, parts = stop - first, []
        num_blocks = -(-count // (devices * size))
        block = -(-count // (num_blocks * devices)) * devices
        with shown_progress(desc, count) as bar:
            for start in range(0, count, block):
                numbers = first + np.arange(start, start + block, dtype=np.int32) % count
                scores = np.asarray(score(numbers.reshape(devices, -1)))
                parts.append(scores.reshape(block, *scores.shape[2:])[: count - start])
                bar.update(len(parts[-1]))
        return {"scores": np.concatenate(parts)}

    return parallel.split_rows(of_share, total)["scores"]
