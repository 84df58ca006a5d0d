"""The six sizes of a picture that Stable Diffusion XL's network is given in addition to its caption, diffusers' `time_ids`:

    height and width of the picture in its file, top and left of what is cut out of it once it is scaled, height and width of that

A picture that is drawn is whole: as large as what is cut, and nothing is cut off.
"""

import numpy as np

from retrack_jax.checks import check, shown
from retrack_jax.data.dataset import ImageSet
from retrack_jax.data.decode import center_of
from retrack_jax.notation import PyTree

# Of the model's own side: XL, of 1024, was not trained on pictures under 256 pixels.
_LEAST_SHARE = 1 / 4


def time_ids_of(images: ImageSet) -> np.ndarray:
    """Returns the sizes of each of `images`, float32 `[N, 6]`. Raises `UserError` if the source does not know them."""
    check(images.sizes is not None, f"{images.name}: pictures that are stored as arrays have no sizes of their own; give files")
    side = images.images.shape[1:3]
    cuts = [center_of(width, height, side[0]) for height, width in images.sizes]
    return np.array([(*size, *cut, *side) for size, cut in zip(images.sizes, cuts, strict=True)], np.float32)


def time_ids_of_whole(side: int) -> np.ndarray:
    """Returns the sizes of a picture that is drawn, float32 `[1, 6]`."""
    return np.array([[side, side, 0, 0, side, side]], np.float32)


def with_time_ids(condition: PyTree, time_ids: np.ndarray | None) -> PyTree:
    """Returns the condition with `time_ids`; as it is if they are None."""
    return condition if time_ids is None else {**condition, "time_ids": time_ids}


def check_large_enough(images: ImageSet, side: int) -> None:
    """Raises `UserError` that names the pictures whose shorter side is under a quarter of the model's own, `side`."""
    least = round(side * _LEAST_SHARE)
    small = [name for name, size in zip(images.ids, images.sizes, strict=True) if min(size) < least]
    check(
        not small,
        f"{len(small)} pictures have a side under {least} pixels, on which Stable Diffusion XL was not trained: {shown(small)}; "
        "give them as large as the model saw them, or leave them out with config.data.exclude",
    )
