"""Many images through a network: how many a call, so that memory grows neither with their number nor their size, and progress."""

from collections.abc import Callable

import numpy as np

from retrack_jax import parallel
from retrack_jax.checks import check_int
from retrack_jax.types import Array
from retrack_jax.writer import progress

MOST_IMAGES = 256
MOST_PIXELS = MOST_IMAGES * 32 * 32


def images_per_call(image_shape: tuple[int, ...]) -> int:
    """Returns how many images `(H, W, C)` a call takes: 256 up to 32 x 32, then as many as have no more pixels; at least one."""
    return min(MOST_IMAGES, max(1, MOST_PIXELS // (image_shape[0] * image_shape[1])))


def shown_progress(desc: str, total: int):
    """Returns the bar of `writer.progress` over `total` images, to be updated by hand; with an empty `desc` it shows nothing."""
    return progress([], desc, total=total, is_main=bool(desc) and parallel.is_main_process(), unit="img")


def in_blocks(
    score: Callable[[np.ndarray], Array], total: int, image_shape: tuple[int, ...], size: int | None = None, desc: str = ""
) -> np.ndarray:
    """Returns the scores of 0, ..., `total` - 1, float64 `[total]`.

    Args:
      score: `score(numbers int32 [B]) -> [B]`, each of its own number alone.
      total: how many there are.
      image_shape: (H, W, C) of the image behind each number.
      size: the largest block; None: `images_per_call`. Blocks are equal, so that one shape is compiled and little is computed
        twice: the last one goes on with the first numbers.
      desc: what a progress bar calls it; none is shown without.
    """
    size = images_per_call(image_shape) if size is None else size
    check_int("batch_size", size, 1)
    size = -(-total // -(-total // size))
    scores = np.empty(total)
    with shown_progress(desc, total) as bar:
        for start in range(0, total, size):
            numbers = np.arange(start, start + size, dtype=np.int32) % total
            scores[start : start + size] = np.asarray(score(numbers), np.float64)[: total - start]
            bar.update(min(size, total - start))
    return scores
