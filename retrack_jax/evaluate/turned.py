"""Turned copies of images: the same pixels, which no model was trained on (evaluate/verdict.py)."""

import numpy as np

# A turned copy that is nearly the image itself, as of a ring, was seen in training too. Correlation of their pixels.
TOO_ALIKE = 0.9


def turned_copies(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns each image upside down or rotated by half a turn, whichever is less like it, and whether it differs enough.

    Left and right are not swapped alone: many models are trained on images that are mirrored like that at random.

    Args:
      images: float `[N, H, W, C]`.

    Returns:
      (copies `[N, H, W, C]`, bool `[N]`)
    """
    candidates = np.stack([images[:, ::-1], images[:, ::-1, ::-1]])
    likeness = np.stack([_correlation(images, copies) for copies in candidates])
    best = likeness.argmin(axis=0)
    return candidates[best, np.arange(len(images))], likeness.min(axis=0) < TOO_ALIKE


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the correlation over pixels of each pair of images, `[N]`; 1 for images of one color."""
    a, b = (x.reshape(len(x), -1) - x.reshape(len(x), -1).mean(axis=1, keepdims=True) for x in (a, b))
    norm = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.where(norm > 0, (a * b).sum(axis=1) / np.where(norm > 0, norm, 1), 1.0)
