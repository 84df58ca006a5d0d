"""A random part of the data that no model trains on. Membership is measured by how well it can be told from forgotten images."""

import numpy as np

from retrack_jax.checks import check, check_number
from retrack_jax.data.dataset import ImageSet, part

_SEED = 0x4E1D


def split_held_out(images: ImageSet, share: float) -> tuple[ImageSet, ImageSet | None]:
    """Returns the training images and the held-out ones, a random `share` in [0, 1) of them; all and None if it is 0.

    The draw depends on the number of images alone: every run and seed holds out the same ones.

    Raises:
      UserError: a share that is no number in [0, 1), or that leaves one of the two empty.
    """
    check_number("config.data.held_out", share, 0.0, 1.0)
    if not share:
        return images, None
    count = round(share * len(images))
    check(0 < count < len(images), f"config.data.held_out is {share}: {count} of {len(images)} images; both parts need some")
    order = np.random.default_rng(_SEED).permutation(len(images))
    training, held_out = np.sort(order[count:]), np.sort(order[:count])
    return part(images, training, "training part"), part(images, held_out, "held-out part", in_memory=True)
