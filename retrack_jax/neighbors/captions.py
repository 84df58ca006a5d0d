"""Neighbors of captioned images: nearest by image and caption together, and how much each counts.

With u the unit vector of a caption's pooled text state, sim(c, c') = <u, u'> and the kernel is that of losses.py:

    (1)  log p_k  =  -||v_k||^2 / 2 + beta sim(c_f, c_k)
    (2)  E ||v_k||^2  =  r^2 ||f - a_k||^2 + const         over the noise of x_t, with r = gamma / sigma
    (3)  ||f - a_k||^2 + beta ||u_f - u_k||^2              orders neighbors as (1) does at r = 1, where signal and noise are equal

(3) is a Euclidean distance, so the same search finds the neighbors, in vectors [a, sqrt(beta) u].
"""

from dataclasses import dataclass

import numpy as np

from retrack_jax.neighbors.search import nearest


@dataclass(frozen=True, kw_only=True, eq=False)
class CaptionedNeighbors:
    """What a search finds for F images.

    Attributes:
      rows: int64 `[F, K]`, rows of the remaining images.
      distances: float32 `[F, K]`, Euclidean between images alone.
      similarity: float32 `[F, K]`, sim(c_f, c_k).
      bias: float32 `[F, K]`, beta sim(c_f, c_k), -inf for a row that only fills up; None if all are 0.
    """

    rows: np.ndarray
    distances: np.ndarray
    similarity: np.ndarray
    bias: np.ndarray | None


def captioned_nearest(
    forget: np.ndarray,
    remain: np.ndarray,
    k: int,
    backend: str,
    *,
    text: np.ndarray,
    forget_caption: np.ndarray,
    remain_caption: np.ndarray,
    beta: float = 0.0,
    same_caption: bool = False,
) -> CaptionedNeighbors:
    """Returns the k nearest remaining images by (3), nearest first.

    Args:
      forget, remain: float32 `[F, ...]` and `[R, ...]`, images in the space that the network denoises.
      k, backend: as in `nearest`.
      text: float32 `[P, D]`, unit vectors of all captions; forget_caption, remain_caption: int `[F]` and `[R]`, rows of it.
      beta: the weight of captions; 0 searches by images alone.
      same_caption: search among images with an equal caption alone. If there are fewer than k of these, the first fills up, with
        a bias of -inf; if there is none, as without `same_caption`.
    """
    similarity = similarities(text, forget_caption, remain_caption)
    rows, distances = np.empty((len(forget), k), np.int64), np.empty((len(forget), k), np.float32)
    bias, alone = np.zeros((len(forget), k), np.float32), np.zeros(len(forget), bool)
    if same_caption:
        alone = (similarity == 1.0).any(axis=1)
        for i in np.flatnonzero(alone):
            equal = np.flatnonzero(similarity[i] == 1.0)
            rows[i], distances[i], bias[i] = _among_equal(forget[i : i + 1], remain, equal, k, backend)
    if len(others := np.flatnonzero(~alone)):
        given = text[forget_caption[others]], text[remain_caption], beta
        rows[others], distances[others] = _among_all(forget[others], remain, *given, k, backend)
        bias[others] = np.float32(beta) * np.take_along_axis(similarity[others], rows[others], axis=1)
    similarity = np.take_along_axis(similarity, rows, axis=1)
    return CaptionedNeighbors(rows=rows, distances=distances, similarity=similarity, bias=bias if bias.any() else None)


def similarities(text: np.ndarray, forget_caption: np.ndarray, remain_caption: np.ndarray) -> np.ndarray:
    """Returns sim of each forgotten and each remaining caption, float32 `[F, R]`: 1 for equal captions, and below for others."""
    below = np.nextafter(np.float32(1), np.float32(0))
    similarity = np.minimum(text[forget_caption] @ text.T, below)
    similarity[np.arange(len(forget_caption)), forget_caption] = 1
    return similarity[:, remain_caption]


def _among_all(
    forget: np.ndarray, remain: np.ndarray, forget_text: np.ndarray, remain_text: np.ndarray, beta: float, k: int, backend: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the k nearest by (3), and their distances as images, both `[F, k]`."""
    if not beta:
        return nearest(forget, remain, k, backend)
    rows, _ = nearest(_with_text(forget, forget_text, beta), _with_text(remain, remain_text, beta), k, backend)
    return rows, np.stack([_distances(one, remain[found]) for one, found in zip(forget, rows, strict=True)])


def _among_equal(one: np.ndarray, remain: np.ndarray, equal: np.ndarray, k: int, backend: str) -> tuple:
    """Returns (rows, distances, bias), each `[k]`, of one image `[1, ...]` among the rows `equal` of `remain`."""
    rows, distances = nearest(one, remain[equal], min(k, len(equal)), backend)
    there = np.arange(k) < rows.shape[1]
    order, bias = np.where(there, np.arange(k), 0), np.where(there, 0.0, -np.inf).astype(np.float32)
    return equal[rows[0, order]], distances[0, order], bias


def _with_text(images: np.ndarray, text: np.ndarray, beta: float) -> np.ndarray:
    return np.concatenate([np.asarray(images).reshape(len(images), -1), np.float32(np.sqrt(beta)) * text], axis=1)


def _distances(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    difference = (others.astype(np.float64) - one).reshape(len(others), -1)
    return np.sqrt(np.square(difference).sum(axis=1)).astype(np.float32)
