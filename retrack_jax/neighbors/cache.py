"""Neighbors of targets, searched once and kept: one file per target.

The file's name is its key: the digest of the pixels, the space in which distances are taken, the queries, the
excluded images, K, the engine and the version of the search.
"""

import importlib.metadata
import logging
from collections.abc import Sequence

import numpy as np

from retrack_jax import files
from retrack_jax.neighbors.search import choose_backend, nearest

VERSION = 2
PIXELS = "pixels in [-1, 1]"
logger = logging.getLogger(__name__)


def cached_nearest_of_targets(
    images,
    targets: Sequence[tuple[np.ndarray, np.ndarray]],
    k: int,
    *,
    cache_dir,
    backend: str = "auto",
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the neighbors of each target; one pass over the images finds those that the cache lacks.

    Args:
      images: has `images`, an array [N, ...] as `nearest` takes it, and `digest`, which changes whenever its content does.
      targets: for each target (rows whose neighbors are wanted, rows that they must not be).
      cache_dir: a folder, or a `gs://` address.

    Raises:
      UserError: as `nearest`, for instance if fewer than k images remain for a target.
    """
    targets = [(np.asarray(rows, np.int64), np.unique(np.asarray(exclude, np.int64))) for rows, exclude in targets]
    shape = (len(images.images), int(np.prod(images.images.shape[1:])))
    engine, _ = choose_backend(backend, shape)
    common = {"version": VERSION, "data": images.digest, "space": PIXELS, "shape": shape, "k": k, "engine": engine}
    if engine != "exact":
        common["scann"] = importlib.metadata.version("scann")
    paths = []
    for rows, exclude in targets:
        key = common | {"queries": files.array_digest(rows), "exclude": files.array_digest(exclude)}
        paths.append(files.cache_path(cache_dir, "neighbors", key, "npz"))
    neighbors = [files.read_cached(path, _read) for path in paths]
    missing = [i for i, known in enumerate(neighbors) if known is None]
    if len(missing) < len(targets):
        known = len(targets) - len(missing)
        logger.info("neighbors of %d of %d targets are read from %s", known, len(targets), paths[0].parent)
    if missing:
        queries = np.concatenate([images.images[targets[i][0]] for i in missing])
        excluded = [targets[i][1] for i in missing for _ in targets[i][0]]
        arrays = nearest(queries, images.images, k, backend, exclude=excluded)
        ends = np.cumsum([len(targets[i][0]) for i in missing])[:-1]
        for i, indices, distances in zip(missing, *(np.split(array, ends) for array in arrays), strict=True):
            neighbors[i] = indices, distances
            files.write_npz(paths[i], advice=files.IN_CACHE, indices=indices, distances=distances)
    return neighbors


def _read(path) -> tuple[np.ndarray, np.ndarray]:
    arrays = files.read_npz(path)
    return arrays["indices"], arrays["distances"]
