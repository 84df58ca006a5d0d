"""Nearest training images: one function, three engines.

    exact        one streaming pass over the images, bounded memory, any platform (exact.py)
    scann brute  ScaNN's brute-force scoring, the whole set as float32 in memory; certified exact (scann_search.py)
    scann tree   ScaNN's tree; approximate, for large sets if ScaNN is asked for by name (scann_search.py)

Whatever engine selects the candidates, their distances are recomputed from differences, and ties go to the lower index.
"""

import importlib.util
import logging
import math
from collections.abc import Sequence

import numpy as np

from retrack_jax.checks import UserError, check, check_choice, check_int
from retrack_jax.data.dataset import RowView
from retrack_jax.data.distinct import distinct_rows
from retrack_jax.data.memory import available_memory
from retrack_jax.neighbors import exact

BACKENDS = ("auto", "scann", "exact")
MEMORY_BUDGET = 3 << 29  # bytes that ScaNN may take; it holds the set twice as float32 while it builds
TREE_IMAGES = 100_000  # ScaNN's guidance: partition larger sets
logger = logging.getLogger(__name__)


def nearest(
    queries,
    images,
    k: int,
    backend: str = "auto",
    *,
    exclude: Sequence | np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns each query's k nearest images: (indices int64 [F, k], Euclidean distances float32 [F, k]), nearest first.

    Ties go to the lower index. Equal queries are searched once.

    Args:
      queries: [F, ...], images like those below.
      images: [N, ...], an array, a memory map or `RowView` of one. uint8 are pixels, measured in [-1, 1], where a level is
        2/255 (see `data.dataset.pixels_to_model`); anything else is taken as float32 as it stands.
      k: how many neighbors, at most the number of images that a query may find.
      backend: `exact`, `scann`, or `auto`: see `choose_backend`. The choice is logged.
      exclude: indices of images that must not be found: one array for all queries, or one array for each query.

    Raises:
      UserError (a ValueError): k > N, an empty input, shapes that differ, values that are not finite, or `scann` if it is
      not installed or the set does not fit the memory.
    """
    check_choice("backend", backend, BACKENDS)
    queries_FD, images_ND = _as_rows(queries, images)
    check_int("k", int(k) if isinstance(k, np.integer) else k)
    excluded_sets, set_of_query_F = _excluded_sets(exclude, len(queries_FD), len(images_ND))
    room = len(images_ND) - max((len(indices) for indices in excluded_sets), default=0)
    check(
        k <= room, f"k is {k}, but only {room} images remain to search ({len(images_ND)} less those left out); choose a smaller k"
    )
    if len(queries_FD) == 0:
        return np.empty((0, k), np.int64), np.empty((0, k), np.float32)

    unique, inverse_F = distinct_rows(queries_FD, set_of_query_F)
    queries_QD = queries_FD[unique]
    set_of_query = set_of_query_F[unique]
    pairs = [(np.flatnonzero(set_of_query == i), indices) for i, indices in enumerate(excluded_sets) if len(indices)]
    engine, reason = choose_backend(backend, images_ND.shape)
    if engine != "exact" and room < len(images_ND) / 2:  # ScaNN would return most of the set and drop it again
        engine, reason = "exact", f"{len(images_ND) - room} images are left out, of one query or all"
    logger.info(
        "neighbors: %d queries (%d distinct) among %d images of %d values by %s: %s",
        len(queries_FD), len(queries_QD), *images_ND.shape, engine, reason,
    )  # fmt: skip
    if engine == "exact":
        indices_QK, distances_QK = exact.search(queries_QD, images_ND, k, pairs)
    else:
        from retrack_jax.neighbors import scann_search

        if backend == "scann":  # auto keeps to its budget
            check_memory(images_ND.shape)
        indices_QK, distances_QK = scann_search.search(queries_QD, images_ND, k, pairs, tree=engine == "scann tree")
    return indices_QK[inverse_F], distances_QK[inverse_F].astype(np.float32)


def scann_installed() -> bool:
    """Returns whether ScaNN can be imported; its wheels are for Linux only."""
    return importlib.util.find_spec("scann") is not None


def choose_backend(backend: str, shape: tuple[int, ...]) -> tuple[str, str]:
    """Returns (`exact`, `scann brute` or `scann tree`; the reason) for a set of `shape` [N, ...]."""
    if backend == "exact":
        return "exact", "asked for"
    if not scann_installed():
        check(
            backend == "auto",
            "backend is 'scann', but ScaNN is not installed (its wheels are for Linux); install it or use 'exact'",
        )
        return "exact", "ScaNN is not installed"
    needed = _scann_bytes(shape)
    if backend == "auto" and needed > MEMORY_BUDGET:
        return "exact", f"ScaNN would need {needed / 2**30:.1f} GiB of memory, more than {MEMORY_BUDGET / 2**30:.1f}"
    if backend == "scann" and shape[0] >= TREE_IMAGES:
        return "scann tree", f"asked for; approximate over {shape[0]} images: it may miss some neighbors, 'exact' misses none"
    return "scann brute", f"{shape[0]} images fit the memory, and brute-force scoring is exact"


def _scann_bytes(shape: tuple[int, ...]) -> int:
    """Returns the bytes that ScaNN takes while it builds: two float32 copies of a set of `shape` [N, ...]."""
    return 8 * math.prod(shape)


def check_memory(shape: tuple[int, ...]) -> None:
    """Raises `UserError` unless ScaNN fits into this machine's memory with a set of `shape` [N, ...]."""
    needed, free = _scann_bytes(shape), available_memory()
    check(
        needed <= free,
        f"ScaNN needs {needed / 2**30:.1f} GiB of memory for {shape[0]} images of {math.prod(shape[1:])} values, and "
        f"{free / 2**30:.1f} are free; set config.unlearn.neighbor_backend=exact (or auto), which reads them block by block",
    )


def _as_rows(queries, images) -> tuple[np.ndarray, np.ndarray]:
    queries = np.asanyarray(queries)
    images = images if isinstance(images, RowView) else np.asanyarray(images)
    check(images.ndim >= 2 and len(images) > 0, f"images have shape {images.shape}; expected [N, ...] with N at least 1")
    check(
        queries.shape[1:] == images.shape[1:] and queries.ndim == images.ndim,
        f"queries have shape {queries.shape} and images {images.shape}; all but the first axis must be the same",
    )
    check(np.prod(images.shape[1:]) > 0, f"images have shape {images.shape}: no values to compare")
    for array in (queries, images):
        check(array.dtype.kind in "uif" or "float" in array.dtype.name, f"images are {array.dtype}; expected uint8 or floats")
    if queries.dtype != np.uint8 or images.dtype != np.uint8:
        queries, images = exact.as_float(queries), exact.as_float(images)
        if not np.isfinite(queries).all():
            raise UserError("queries hold values that are not finite")
    images_ND = images.as_vectors() if isinstance(images, RowView) else images.reshape(len(images), -1)
    return queries.reshape(len(queries), -1), images_ND


def _excluded_sets(exclude, num_queries: int, num_images: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns the distinct sorted arrays of excluded indices, and which of them each query uses."""
    if exclude is None:
        return [], np.zeros(num_queries, np.int64)
    shared = isinstance(exclude, np.ndarray) or len(exclude) == 0 or np.ndim(exclude[0]) == 0
    arrays = [np.unique(np.asarray(part, np.int64)) for part in ([exclude] if shared else exclude)]
    check(shared or len(arrays) == num_queries, f"exclude has {len(arrays)} arrays for {num_queries} queries")
    for part in arrays:
        check(not len(part) or (part[0] >= 0 and part[-1] < num_images), f"exclude names images outside [0, {num_images})")
    if shared:
        return arrays, np.zeros(num_queries, np.int64)
    keys = {part.tobytes(): part for part in arrays}
    order = {key: i for i, key in enumerate(keys)}
    return list(keys.values()), np.array([order[part.tobytes()] for part in arrays])
