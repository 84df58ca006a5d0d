"""Neighbors found once, kept, and checked before they are used again.

A file holds the neighbors of one target. It is named by its key: the digest of the pixels (or latents), the space in which
distances are taken, the queries, the excluded images, K, the engine and the version of the search. It also holds the key
and a SHA-256 of its arrays; one that does not match, or that names impossible neighbors, is searched again, never trusted.

For repeated deletions from one large set (`backend="scann"`), ScaNN's tree index of the whole set is kept as well: built
once, loaded, and told at query time what to leave out.
"""

import importlib.metadata
import logging
from collections.abc import Sequence

import numpy as np
from etils import epath

from retrack_jax import files
from retrack_jax.checks import check
from retrack_jax.neighbors.distinct import distinct_rows
from retrack_jax.neighbors.search import MEMORY_BUDGET, TREE_IMAGES, TREE_QUERIES, check_memory, choose_backend, nearest

VERSION = 1
PIXELS = "pixels in [-1, 1]"
logger = logging.getLogger(__name__)


def cached_nearest(
    images, query_rows, k: int, *, exclude, cache_dir, backend: str = "auto", space: str = PIXELS
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the neighbors of one target: (rows int64 [F, k], distances float32 [F, k]). As `cached_nearest_of_targets`."""
    return cached_nearest_of_targets(images, [(query_rows, exclude)], k, cache_dir=cache_dir, backend=backend, space=space)[0]


def cached_nearest_of_targets(
    images,
    targets: Sequence[tuple[np.ndarray, np.ndarray]],
    k: int,
    *,
    cache_dir,
    backend: str = "auto",
    space: str = PIXELS,
    memory_budget: int = MEMORY_BUDGET,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the neighbors of each target; those that the cache lacks are found in one pass over the images (one for each
    engine, which is chosen for each target alone, so that a sweep and a single run look for the same file).

    Args:
      images: has `images`, an array [N, ...] as `nearest` takes it, and `digest`, which changes whenever its content does.
      targets: for each target (rows whose neighbors are wanted, rows that they must not be).
      cache_dir: a folder, or a `gs://` address.
      space: what the values are, where it is not pixels: say the autoencoder's digest.

    Raises:
      UserError: as `nearest`, for instance if fewer than k images remain for a target.
    """
    shape = (len(images.images), int(np.prod(images.images.shape[1:])))
    keeps_index = backend == "scann" and shape[0] >= TREE_IMAGES
    targets = [(np.asarray(rows, np.int64), np.unique(np.asarray(exclude, np.int64))) for rows, exclude in targets]
    choices = [choose_backend(backend, shape, _num_distinct(images, rows), memory_budget) for rows, _ in targets]
    engines = ["scann tree" if keeps_index else engine for engine, _ in choices]
    keys = [
        _key(images.digest, space, shape, rows, exclude, k, engine)
        for (rows, exclude), engine in zip(targets, engines, strict=True)
    ]
    paths = [epath.Path(cache_dir) / "neighbors" / f"{files.json_digest(key)[:32]}.npz" for key in keys]
    found = [
        _load(path, key, exclude, len(rows), shape[0], k) for path, key, (rows, exclude) in zip(paths, keys, targets, strict=True)
    ]
    for engine in dict.fromkeys(engines):
        missing = [i for i, result in enumerate(found) if result is None and engines[i] == engine]
        if not missing:
            continue
        queries = np.concatenate([images.images[targets[i][0]] for i in missing])
        excluded = [targets[i][1] for i in missing for _ in targets[i][0]]
        index = kept_index(images, cache_dir, space) if keeps_index else None
        indices, distances = nearest(
            queries, images.images, k, backend, exclude=excluded, chosen=choices[missing[0]], index=index
        )
        start = 0
        for i in missing:
            part = slice(start, start := start + len(targets[i][0]))
            found[i] = indices[part], distances[part]
            _save(paths[i], keys[i], *found[i])
    return found


def _num_distinct(images, rows: np.ndarray) -> int:
    """Distinct images among `rows`, counted only where there are enough rows for the number to decide something."""
    return len(rows) if len(rows) < TREE_QUERIES else len(distinct_rows(images.images[rows])[0])


def kept_index(images, cache_dir, space: str = PIXELS):
    """Returns ScaNN's tree index of all `images` (a `ScannIndex`): the one in `cache_dir` if it is whole and theirs,
    else a new one.

    ScaNN reads and writes local folders only.

    Raises:
      UserError: the set does not fit the memory, or `cache_dir` is no local folder.
    """
    from retrack_jax.neighbors.scann_index import ScannIndex

    check(
        "://" not in str(cache_dir),
        f"config.data.cache_dir is {cache_dir}; ScaNN's tree is kept in local folders only: set one, "
        "or set config.unlearn.neighbor_backend=exact",
    )
    key = [VERSION, images.digest, space, list(images.images.shape), importlib.metadata.version("scann")]
    folder = epath.Path(cache_dir).expanduser() / "neighbors" / f"{files.json_digest(key)[:32]}.scann"
    check_memory(images.images.shape, copies=1)
    index = ScannIndex.load(folder, len(images.images))
    if index is None:
        check_memory(images.images.shape, copies=2)
        logger.info("neighbors: building ScaNN's tree index of %d images; it is kept in %s", len(images.images), folder)
        index = ScannIndex.build(np.asanyarray(images.images).reshape(len(images.images), -1), tree=True)
        index.save(folder)
    return index


def _key(digest, space, shape, rows, exclude, k, engine) -> dict:
    scann = importlib.metadata.version("scann") if engine.startswith("scann") else None
    return {
        "version": VERSION,
        "data": digest,
        "space": space,
        "shape": list(shape),
        "queries": files.array_digest(rows),
        "exclude": files.array_digest(exclude),
        "k": k,
        "engine": engine,
        "scann": scann,
    }


def _save(path, key: dict, indices: np.ndarray, distances: np.ndarray) -> None:
    files.write_npz(
        path,
        advice=files.IN_CACHE,
        indices=indices,
        distances=distances,
        key=np.array(files.json_digest(key)),
        digest=np.array(files.array_digest(indices, distances)),
    )


def _load(path, key: dict, exclude: np.ndarray, num_queries: int, num_images: int, k: int):
    """The arrays in the file if they are what was saved for this key, else None."""
    if not path.exists():
        return None
    try:
        with path.open("rb") as file, np.load(file) as saved:
            indices, distances = saved["indices"], saved["distances"]
            whole = str(saved["digest"]) == files.array_digest(indices, distances)
            right = str(saved["key"]) == files.json_digest(key)
    except Exception as error:  # zipfile, zlib and NumPy each have their own
        logger.warning("neighbors: %s is damaged (%s); searching again", path, error)
        return None
    possible = indices.shape == distances.shape == (num_queries, k) and indices.min() >= 0 and indices.max() < num_images
    if not (whole and right and possible) or np.isin(indices, exclude).any():
        logger.warning("neighbors: %s is not what was saved for these images; searching again", path)
        return None
    logger.info("neighbors: read from %s", path)
    return indices, distances
