"""Images that no model trains on: a random part held out for membership, and those that an earlier run made the model forget."""

import logging

import numpy as np

from retrack_jax.checks import UserError, check
from retrack_jax.data.dataset import ImageSet, RowView, part
from retrack_jax.data.distinct import copies_of, distinct_rows
from retrack_jax.data.target_names import resolve_target

_SEED = 0x4E1D
log = logging.getLogger(__name__)


def split_held_out(images: ImageSet, share: float) -> tuple[ImageSet, ImageSet | None]:
    """Returns the training images and the held-out ones, a random `share` in [0, 1) of them; all and None if it is 0.

    Membership is measured by how well held-out images can be told from forgotten ones. The draw depends on the number of images
    alone: every run and seed holds out the same ones.

    Raises:
      UserError: a share that leaves one of the two empty.
    """
    if not share:
        return images, None
    count = round(share * len(images))
    check(0 < count < len(images), f"config.data.held_out is {share}: {count} of {len(images)} images; both parts need some")
    order = np.random.default_rng(_SEED).permutation(len(images))
    training, held_out = np.sort(order[count:]), np.sort(order[:count])
    return part(images, training, "training part"), part(images, held_out, "held-out part", in_memory=True)


def unseen(held_out: ImageSet, training: ImageSet) -> ImageSet:
    """Returns the distinct held-out images of which no copy is trained on: a model knows a copy as well as the image.

    Raises:
      UserError: there are none.
    """
    distinct, _ = distinct_rows(held_out.images)
    copies = copies_of(RowView(held_out.images, distinct), training.images)
    kept = np.delete(distinct, sorted(copies))
    check(len(kept) > 0, f"every image that config.data.held_out leaves out has a copy among the others ({held_out.name})")
    if len(kept) == len(held_out):
        return held_out
    log.info("%s: %d of %d are copies, and left out", held_out.name, len(held_out) - len(kept), len(held_out))
    return part(held_out, kept, "without copies", in_memory=True)


def without(images: ImageSet, spec: str) -> ImageSet:
    """Returns the training images that `spec` does not name, as if the data had never held the others; all if it is empty.

    Raises:
      UserError: as for a target (target_names.py), which `spec` is written as: a name that is not there, or all of the images.
    """
    if not spec.strip():
        return images
    try:
        excluded = resolve_target(spec, images)
    except UserError as error:
        raise UserError(f"config.data.exclude is {spec!r}, read as a target is: {error}") from error
    kept = np.setdiff1d(np.arange(len(images)), excluded)
    return part(images, kept, f"without {len(excluded)} excluded")


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
