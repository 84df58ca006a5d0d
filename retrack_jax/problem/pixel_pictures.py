"""What the report shows of images in pixels: the forgotten ones beside their neighbors, and which samples are copies of them."""

import dataclasses

import numpy as np

from retrack_jax.data.dataset import ImageSet
from retrack_jax.metrics.frequency import target_distances
from retrack_jax.neighbors.cache import cached_nearest
from retrack_jax.problem.target import Target

SHOWN = 8  # of a large group a page shows some


def copies_of(forgotten: np.ndarray, arrays: dict[str, np.ndarray], threshold: float) -> np.ndarray:
    """bool `[N]`: which samples lie nearer than `threshold` (L2 of [0, 1] pixels) to one of `forgotten`, uint8 `[F, H, W, C]`.

    Args:
      arrays: as in `samples.npz`; floats are taken where they were kept.
    """
    return target_distances(arrays.get("samples_float", arrays["samples"]), forgotten) < threshold


def forgotten_and_neighbors(images: ImageSet, target: Target, num_neighbors: int, backend: str, cache_dir) -> dict:
    """Returns `forgotten` uint8 `[F, H, W, C]`, `neighbors` uint8 `[F, K, H, W, C]` and `distances` `[F, K]` of the first images.

    K is `num_neighbors`, or as many as remain: methods that search no neighbors set no bound on it.
    """
    few = dataclasses.replace(target, unique=target.unique[:SHOWN])
    k = min(num_neighbors, len(target.remain))
    rows, distances = cached_nearest(images, few.unique, k, exclude=target.forget, backend=backend, cache_dir=cache_dir)
    return {"forgotten": images.images[few.unique], "neighbors": images.images[rows], "distances": distances}
