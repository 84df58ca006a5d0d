"""What one run forgets, as rows and as what the training step holds."""

from dataclasses import dataclass

import numpy as np

from retrack_jax.data.target_names import slug
from retrack_jax.neighbors.distinct import distinct_rows
from retrack_jax.notation import PyTree


@dataclass(frozen=True, eq=False)
class Target:
    """What one run forgets: rows of the image set.

    Attributes:
      spec: as the user wrote it; slug: its name in paths.
      forget, remain: int rows; together the whole set.
      unique: rows of the distinct forgotten images, in the order of their pixels; copy_of `[F]`: for each forgotten row,
        which of them it is.
    """

    spec: str
    slug: str
    forget: np.ndarray
    remain: np.ndarray
    unique: np.ndarray
    copy_of: np.ndarray


@dataclass(frozen=True, eq=False)
class ForgetData:
    """What the training step holds on the device about a target (see train/step.py `Shared`), and what the report shows."""

    forget: PyTree
    neighbors: PyTree | None = None
    neighbor_rows: np.ndarray | None = None
    neighbor_images: np.ndarray | None = None  # uint8 [F, K, H, W, C]
    distances: np.ndarray | None = None


def make_target(spec: str, forget: np.ndarray, remain: np.ndarray, pictures: np.ndarray) -> Target:
    """Returns the target of the rows `forget`, whose images are `pictures` `[F, H, W, C]`: copies are equal in every pixel."""
    first, copy_of = distinct_rows(pictures)
    order = np.array(sorted(range(len(first)), key=lambda i: pictures[first[i]].tobytes()))
    return Target(spec, slug(spec), forget, remain, forget[first[order]], np.argsort(order)[copy_of])
