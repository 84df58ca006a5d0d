"""Leaves out images that an earlier run made the model forget, as if the data had never held them."""

import numpy as np

from retrack_jax.checks import UserError
from retrack_jax.data.dataset import ImageSet, part
from retrack_jax.data.target_names import resolve_target


def resolve_remaining(spec: str, images: ImageSet, training: ImageSet) -> np.ndarray:
    """Returns the rows of `images` that a target names; `training` are the images before any were excluded.

    Raises:
      UserError: as `resolve_target`; and it says so if what the target names is excluded.
    """
    try:
        return resolve_target(spec, images)
    except UserError as error:
        try:
            rows = resolve_target(spec, training)
        except UserError:
            raise error from None
        gone = [training.ids[row] for row in rows if training.ids[row] not in images.ids]
        raise UserError(
            f"the target {spec!r} names {', '.join(gone[:3])}, which config.data.exclude leaves out; take it from one of the two"
            if gone else str(error)
        ) from error  # fmt: skip


def without(images: ImageSet, spec: str) -> ImageSet:
    """Returns the images that `spec` does not name; all of them if it is empty.

    Args:
      images: the training images.
      spec: what to leave out, written as a target is (target_names.py).

    Raises:
      UserError: as for a target: a name that is not there, or all of the images.
    """
    if not spec.strip():
        return images
    try:
        excluded = resolve_target(spec, images)
    except UserError as error:
        raise UserError(f"config.data.exclude is {spec!r}, read as a target is: {error}") from error
    kept = np.setdiff1d(np.arange(len(images)), excluded)
    return part(images, kept, f"without {len(excluded)} excluded")
