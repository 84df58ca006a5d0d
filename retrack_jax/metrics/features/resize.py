"""The resize rules of the feature networks, each as one matrix per side.

Equations, for an input of n pixels, an output of m, s = n/m, output pixel i:
    (1)  tf1:           c = i s,  lo = floor(c),  d = c - lo:   out_i = (1 - d) in_lo + d in_min(lo + 1, n - 1)
    (2)  torchmetrics:  c = (i + 1/2) s,  r = max(s, 1):        out_i = sum_j w_j in_j / sum_j w_j,
                        w_j = max(0, 1 - |j + 1/2 - c| / r)     (half-pixel centers; antialiased if it shrinks)

(1) is what TensorFlow 1 did to the images that FID was defined on, and what torch-fidelity does; (2) is PyTorch's `interpolate`
with `antialias=True`, which torchmetrics uses since 1.8. They give different FIDs, so a result names its rule.
"""

import numpy as np

from retrack_jax.checks import check_choice

RULES = ("torchmetrics", "tf1")


def resize_matrix(rule: str, num_in: int, num_out: int) -> np.ndarray:
    """Returns the float32 matrix `[num_out, num_in]` of equation 1 or 2; its rows sum to 1."""
    check_choice("resize", rule, RULES)
    return (_tf1 if rule == "tf1" else _antialiased)(num_in, num_out)


def _tf1(num_in: int, num_out: int) -> np.ndarray:
    # In float32, as TensorFlow computes the centers: rounding decides to which pixel a center on an edge belongs.
    center = np.arange(num_out, dtype=np.float32) * np.float32(num_in / num_out)
    low = center.astype(np.int64)
    fraction = center - low.astype(np.float32)
    matrix = np.zeros((num_out, num_in), np.float32)
    rows = np.arange(num_out)
    np.add.at(matrix, (rows, low), 1 - fraction)
    np.add.at(matrix, (rows, np.minimum(low + 1, num_in - 1)), fraction)
    return matrix


def _antialiased(num_in: int, num_out: int) -> np.ndarray:
    scale = num_in / num_out
    center = (np.arange(num_out) + 0.5) * scale
    distance = np.abs(np.arange(num_in)[None, :] + 0.5 - center[:, None])
    weights = np.maximum(0.0, 1.0 - distance / max(scale, 1.0))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def pil_shorter_side(image: np.ndarray, size: int) -> np.ndarray:
    """Returns an RGB uint8 image `[H, W, 3]` whose shorter side is `size`, by Pillow's bilinear filter.

    torchvision's `Resize(size)` does this to a PIL image: the longer side is rounded down to whole pixels, pixels stay uint8.
    """
    from PIL import Image

    height, width = image.shape[:2]
    if min(height, width) == size:
        return image
    new = (int(size * height / width), size) if width <= height else (size, int(size * width / height))
    return np.asarray(Image.fromarray(image).resize((new[1], new[0]), Image.Resampling.BILINEAR))
