"""What one run forgets: rows of a set of images, and what the training step holds of them."""

from dataclasses import dataclass

import numpy as np

from retrack_jax.data.dataset import ImageSet
from retrack_jax.data.sources.concepts import Concept
from retrack_jax.data.target_names import slug
from retrack_jax.neighbors.distinct import distinct_rows
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
        which of them it is.
      concept: where the images come from, if they are pictures of one concept.
    """

    spec: str
    slug: str
    images: ImageSet
    forget: np.ndarray
    remain: np.ndarray
    unique: np.ndarray
    copy_of: np.ndarray
    concept: Concept | None = None


@dataclass(frozen=True, eq=False)
class ForgetData:
    """What the training step holds on the device about a target (train/step.py `Shared`), and what the report shows.

    Attributes:
      forget: the distinct forgotten examples, as `data.dataset.to_x_0` takes them.
      neighbors: their distinct neighbors, likewise; neighbor_rows: int `[F, K]`, rows of `neighbors`.
      neighbor_positions: int `[F, K]`, the same neighbors as rows of the target's images.
      distances: float32 `[F, K]`, Euclidean, in the space that the network denoises.
      similarity, neighbor_bias: float32 `[F, K]`, of captioned images (neighbors/captions.py).
      anchor: which forgotten examples follow the pretrained prediction, or None.
    """

    forget: PyTree
    neighbors: PyTree | None = None
    neighbor_rows: np.ndarray | None = None
    neighbor_positions: np.ndarray | None = None
    distances: np.ndarray | None = None
    similarity: np.ndarray | None = None
    neighbor_bias: np.ndarray | None = None
    anchor: Anchor | None = None


def make_target(
    spec: str, images: ImageSet, forget: np.ndarray, remain: np.ndarray, concept: Concept | None = None
) -> Target:
    """Returns the target of the rows `forget` of `images`.

    Copies share one row of `unique`: images that are equal in every pixel, and in their caption if they have any.
    """
    pictures = images.images[forget]
    captions = None if images.captions is None else [images.captions[row] for row in forget]
    kinds = None if captions is None else np.unique(captions, return_inverse=True)[1]
    first, copy_of = distinct_rows(pictures, kinds)
    order = np.array(sorted(range(len(first)), key=lambda i: pictures[first[i]].tobytes()))
    return Target(spec, slug(spec), images, forget, remain, forget[first[order]], np.argsort(order)[copy_of], concept)
