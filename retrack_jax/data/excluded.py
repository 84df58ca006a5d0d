"""Leaves out images that an earlier run made the model forget, as if the data had never held them."""

import numpy as np

from retrack_jax.checks import UserError
from retrack_jax.data.dataset import ImageSet, part
from retrack_jax.data.target_names import resolve_target


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
