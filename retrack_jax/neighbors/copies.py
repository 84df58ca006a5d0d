"""Copies of forgotten images among the remaining ones: the model continues to learn them, whatever it should forget."""

import logging
from collections.abc import Callable

import numpy as np

log = logging.getLogger(__name__)


def warn_of_copies(forget: np.ndarray, nearest: np.ndarray, name: Callable[[int], str]) -> None:
    """Logs a warning if some forgotten images `[F, ...]` equal their nearest remaining image, the same row of `nearest`.

    ReTrack would lead such an image to itself, and the loss on remaining images preserves it. A copy that differs in a single
    value has the same effect and is not detected here; the report shows the neighbors with their distances.

    Args:
      name: row -> what to call that forgotten image and its copy.
    """
    copied = [row for row, (one, other) in enumerate(zip(forget, nearest, strict=True)) if np.array_equal(one, other)]
    if copied:
        log.warning(
            "%d of %d forgotten images have a copy among the remaining ones (%s): a model continues to learn those; "
            "make every copy part of the target",
            len(copied),
            len(forget),
            name(copied[0]),
        )
