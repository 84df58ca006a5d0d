"""What one run forgets: rows of a set of images, and what the training step holds of them."""

from dataclasses import dataclass, replace

import numpy as np

from retrack_jax.data.dataset import ImageSet
from retrack_jax.data.distinct import distinct_rows
from retrack_jax.data.labels import remaining_of_labels
from retrack_jax.data.sources.concepts import Concept
from retrack_jax.data.target_names import slug
from retrack_jax.notation import PyTree
from retrack_jax.unlearn.streams import Anchor


@dataclass(frozen=True, eq=False)
class Target:
    """What one run forgets.

    Attributes:
      spec: as the user wrote it; slug: its name in paths.
      images: the training images, which the rows below number.
      forget, remain: int rows; together the whole set.
      unique: rows of the distinct forgotten images, in the order of their pixels; copy_of `[F]`: for each forgotten row,
        which of them it is. Images under different labels are distinct.
      concept: where the images come from, if they are pictures of one concept.
      labels: int32 `[N]`, the label of each image; None: the network takes none.
      null: the label that stands for none, if the network has one.
    """

    spec: str
    slug: str
    images: ImageSet
    forget: np.ndarray
    remain: np.ndarray
    unique: np.ndarray
    copy_of: np.ndarray
    concept: Concept | None = None
    labels: np.ndarray | None = None
    null: int | None = None


@dataclass(frozen=True, eq=False)
class ForgetData:
    """What the training step holds on the device about a target (train/step.py `Shared`), and what the report shows.

    Attributes:
      forget, neighbors, neighbor_rows, null_neighbor_rows, neighbor_bias, anchor: as in `Shared`.
      neighbor_positions: int `[F, K]`, the neighbors of `neighbor_rows` as rows of the target's images.
      distances: float32 `[F, K]`, Euclidean, in the space that the network denoises.
      similarity: float32 `[F, K]`, of captioned images (neighbors/captions.py).
    """

    forget: PyTree
    neighbors: PyTree | None = None
    neighbor_rows: np.ndarray | None = None
    neighbor_positions: np.ndarray | None = None
    distances: np.ndarray | None = None
    null_neighbor_rows: np.ndarray | None = None
    similarity: np.ndarray | None = None
    neighbor_bias: np.ndarray | None = None
    anchor: Anchor | None = None


def make_target(spec: str, images: ImageSet, forget: np.ndarray, remain: np.ndarray, concept: Concept | None = None) -> Target:
    """Returns the target of the rows `forget` of `images`.

    Copies share one row of `unique`: images that are equal in every pixel, and in their caption if they have any.
    """
    captions = None if images.captions is None else np.array([images.captions[row] for row in forget])
    unique, copy_of = _distinct(images, forget, captions)
    return Target(spec, slug(spec), images, forget, remain, unique, copy_of, concept)


def with_labels(target: Target, null: np.ndarray | None) -> Target:
    """Returns the target for a network that takes labels: copies under different labels are not the same.

    `null` is `[1]`, the label that stands for none, or None.
    """
    labels = np.asarray(target.images.labels).astype(np.int32)
    unique, copy_of = _distinct(target.images, target.forget, labels[target.forget])
    return replace(target, unique=unique, copy_of=copy_of, labels=labels, null=None if null is None else int(null[0]))


def neighbor_pools(target: Target) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns, for each search for neighbors, which of `target.unique` it is for, and the rows that are no neighbors of theirs.

    Without labels there is one search, among all remaining images. With labels there is one for each label, among those of the
    label (all, if there are none); and last, if there is a null label, one for all forgotten images among all remaining ones.
    """
    everyone = [(np.arange(len(target.unique)), target.forget)]
    if target.labels is None:
        return everyone
    of_unique, every = target.labels[target.unique], np.arange(len(target.labels))
    pools = [
        (np.flatnonzero(of_unique == label), np.setdiff1d(every, rows) if len(rows) else target.forget)
        for label, rows in remaining_of_labels(target.labels, target.forget).items()
    ]
    pools = [(mine, others) for mine, others in pools if len(mine)]  # a part of the target need not have every label
    return pools if target.null is None else pools + everyone


def _distinct(images: ImageSet, rows: np.ndarray, conditions: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first row of each distinct image, in the order of pixels, and which of these each of `rows` is.

    Images under different `conditions` `[len(rows)]`, labels or captions, are distinct.
    """
    pictures = images.images[rows]
    kinds = None if conditions is None else np.unique(conditions, return_inverse=True)[1]
    first, copy_of = distinct_rows(pictures, kinds)
    order = np.array(sorted(range(len(first)), key=lambda i: pictures[first[i]].tobytes()))
    return rows[first[order]], np.argsort(order)[copy_of]
