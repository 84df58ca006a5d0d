"""Checks of the arrays that callers pass to metrics."""

import numpy as np

from retrack_jax.checks import UserError, check


def unit_images(name: str, images) -> np.ndarray:
    """Returns images as float32 in [0, 1], `[N, H, W, C]`; uint8 is divided by 255.

    Raises:
      UserError: an array of another rank, no image, NaN or infinity, or floats outside [0, 1].
    """
    images = check_images(name, images)
    return images.astype(np.float32) / np.float32(255.0) if images.dtype == np.uint8 else images.astype(np.float32)


def pixel_images(name: str, images) -> np.ndarray:
    """Returns images as uint8 `[N, H, W, C]`; floats in [0, 1] become floor(255 x), the rule of the official code.

    Raises:
      UserError: as `unit_images`.
    """
    images = check_images(name, images)
    return images if images.dtype == np.uint8 else np.floor(255.0 * images.astype(np.float32)).astype(np.uint8)


def check_images(name: str, images) -> np.ndarray:
    """Returns `images` as an array after checking them: uint8, or finite floats in [0, 1], `[N, H, W, C]` with N > 0."""
    images = images if isinstance(images, np.ndarray) else np.asarray(images)
    check(images.ndim == 4 and len(images) > 0, f"{name} have shape {images.shape}; expected at least one image, [N, H, W, C]")
    if images.dtype == np.uint8:
        return images
    check(np.issubdtype(images.dtype, np.floating), f"{name} are {images.dtype}; expected uint8, or floats in [0, 1]")
    bad = ~np.isfinite(images.reshape(len(images), -1)).all(axis=1)
    if bad.any():
        raise UserError(
            f"{name}: {int(bad.sum())} of {len(images)} images hold NaN or infinity, the first is number {int(bad.argmax())}; "
            "the model that drew them has diverged"
        )
    low, high = float(images.min()), float(images.max())
    check(low >= 0.0 and high <= 1.0, f"{name} lie in [{low:.3g}, {high:.3g}]; expected uint8, or floats in [0, 1]")
    return images


def check_features(name: str, features) -> np.ndarray:
    """Returns features `[N, D]` as an array. Raises `UserError` for another rank, no row, NaN or infinity."""
    features = np.asarray(features)
    check(features.ndim == 2 and len(features) > 0, f"{name} have shape {features.shape}; expected [N, D] with N > 0")
    bad = ~np.isfinite(features).all(axis=1)
    if bad.any():
        raise UserError(
            f"{name}: {int(bad.sum())} of {len(features)} rows hold NaN or infinity, the first is row {int(bad.argmax())}"
        )
    return features
