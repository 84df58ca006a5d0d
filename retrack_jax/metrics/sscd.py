"""SSCD: how much a generated image is a copy of the forgotten one, and a variant that does not reward ruined images.

Equations, with x_0 the forgotten image, x the image that the model makes of it, f the SSCD embedding of unit length (512
numbers):
    (1)  SSCD     = <f(x_0), f(x)>                                                  in [-1, 1]; lower is more forgotten
    (2)  x'       = clip(x_0 + r sqrt(HWC) (x - x_0) / ||x - x_0||_2, 0, 1)         over pixels in [0, 1]
    (3)  SSCDnorm = <f(x_0), f(x')>

The protocol of the official code: noise x_0 to t = 250, denoise it by ancestral DDPM on the full schedule (`sampling.inject`),
and apply (1) to the one image that comes out. SSCD also falls if x is merely ruined. (2) therefore scales the change of every
method to one size and keeps its direction, so that (3) compares where the image went, not how far. SSCDnorm is the idea of arXiv
2510.17917, which has "a normalized perturbation distance" by the l2 norm. Its exact equation was not available to us: (2) and r =
0.1 are OUR READING, and these numbers can be compared only with each other.
"""

from collections.abc import Callable

import numpy as np

from retrack_jax.checks import check
from retrack_jax.metrics.arrays import check_features, pixel_images, unit_images

RADIUS = 0.1  # r of equation 2, the root mean square of the normalized difference


def cosine_similarity(features, targets) -> np.ndarray:
    """Returns the cosine between each row of `features` `[N, D]` and its row of `targets` `[N, D]`, or their only row `[1, D]`.

    Raises:
      UserError: NaN, or shapes that do not pair.
    """
    features, targets = (check_features("features", rows).astype(np.float64) for rows in (features, targets))
    check(
        features.shape[1] == targets.shape[1] and len(targets) in (1, len(features)),
        f"features {features.shape} and targets {targets.shape} do not pair; give one target a row, or one in all",
    )
    lengths = np.linalg.norm(features, axis=1) * np.linalg.norm(targets, axis=1)
    return np.sum(features * targets, axis=1) / np.maximum(lengths, 1e-12)


def sscd(embed: Callable, images, targets) -> np.ndarray:
    """Returns the SSCD of each image with its target (equation 1), float64 `[N]`.

    Args:
      embed: the feature network, images -> `{"features": [N, D]}`.
      images: `[N, H, W, C]`, floats in [0, 1] (taken as floor(255 x)) or uint8.
      targets: alike, one per image, or `[1, H, W, C]` for all.

    Raises:
      UserError: NaN, or shapes that do not pair.
    """
    features = [embed(pixel_images(name, array))["features"] for name, array in (("images", images), ("targets", targets))]
    return cosine_similarity(*features)


def sscd_of_nearest(embed: Callable, images, targets) -> np.ndarray:
    """Returns the largest SSCD of each image with any of `targets` `[M, H, W, C]`, float64 `[N]`; otherwise as `sscd`."""
    features, others = (
        embed(pixel_images(name, array))["features"] for name, array in (("images", images), ("targets", targets))
    )
    return np.max([cosine_similarity(features, one[None]) for one in others], axis=0)


def sscd_norm(embed: Callable, images, targets) -> np.ndarray:
    """Returns the SSCDnorm of each image with its target (equation 3), float64 `[N]`; arguments and errors as in `sscd`."""
    return sscd(embed, normalized_perturbation(images, targets), targets)


def normalized_perturbation(images, targets) -> np.ndarray:
    """Returns the targets moved by `RADIUS` in the direction of their images (equation 2), float32 `[N, H, W, C]` in [0, 1].

    An image that equals its target has no direction, and stays as it is.
    """
    images, targets = unit_images("images", images), unit_images("targets", targets)
    check(
        images.shape[1:] == targets.shape[1:] and len(targets) in (1, len(images)),
        f"images {images.shape} and targets {targets.shape} do not pair; give one target per image, or one in all",
    )
    difference = images.astype(np.float64) - targets
    length = np.sqrt(np.sum(difference**2, axis=(1, 2, 3), keepdims=True))
    step = RADIUS * np.sqrt(difference[0].size) * difference / np.maximum(length, 1e-12)
    return np.clip(targets + step, 0.0, 1.0).astype(np.float32)
