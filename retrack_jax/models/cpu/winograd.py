"""A 3 x 3 convolution with half the multiplications, for CPU: Winograd's minimal filtering F(4, 3) along one axis of the image.

Four neighboring outputs y of a filter g with three taps are a bilinear form of rank 6 in g and the six inputs d that they see
(Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308):

    (1) y = A^T [(G g) * (B^T d)]                     6 products in place of 12
    (2) dL/dg = G^T [(A dL/dy) * (B^T d)]             the transpose of (1) in g

Here * is a convolution over the other axis and a matrix product over the channels. (1) of many channels goes along the columns:
what is added are whole rows, and each of the 6 terms is a 1 x 3 convolution of images a quarter as high, which XLA runs on both
cores. Along the rows, 3 x 1 convolutions of large images ran on one of them. Networks of fewer channels were quicker along the
rows. (2) goes along the rows too, because it is summed over strips of rows.

The two-dimensional F(2 x 2, 3 x 3) was measured too: it is 1.0 to 1.3 times as fast as the direct form, this one 1.8 times,
because the transforms of the former move four times the data. Rounding: 1.2e-6 of the norm (the direct sum: 5e-7); the kernel
gradient 1.1e-6 to 2.6e-6.

Shapes: H and W are multiples of 4, padding is 1 on every side, arrays are float32. `h` and `w` count groups of four pixels.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

from retrack_jax.notation import Array

_B_T = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_G = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_A_T = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))
# Values of the wider of x and dy in a strip of (2), which sums over its pixels: a larger strip does not stay in a core's cache
# from one row of the result to the next. The direct form does not at 32 x 32 already, and takes up to 5 times as long.
_STRIP = 1 << 18
_ALONG_COLUMNS = 128  # channels from which (1) goes along the columns
_A, _G_T = tuple(zip(*_A_T, strict=True)), tuple(zip(*_G, strict=True))


def pays(x_shape: tuple[int, ...], kernel_shape: tuple[int, ...], strides: int, padding, dtype) -> bool:
    """Whether (1) applies and is the faster: 3 x 3, stride 1, padding 1, float32, and wide enough in pixels and channels.

    Measured on two cores: 1.8 times faster at 32 x 32 x 128 and at 16 x 16 x 256; at 8 x 8 the transforms cost what is gained.
    """
    _, height, width, channels = x_shape
    fits = kernel_shape[:2] == (3, 3) and strides == 1 and padding == ((1, 1), (1, 1)) and dtype == jnp.float32
    return fits and height % 4 == width % 4 == 0 and min(height, width) >= 16 and min(channels, kernel_shape[-1]) >= 64


def convolve(x_BHWC: Array, kernel: Array) -> Array:
    """Returns the convolution of `x` `[B, H, W, C]` with `kernel` `[3, 3, C, O]` by (1), `[B, H, W, O]`."""
    axis = 1 if min(kernel.shape[2:]) >= _ALONG_COLUMNS else 2
    one = tuple((int(side == axis),) * 2 for side in range(4))
    other = (one[2], one[1])
    padded_BHWC = jnp.pad(x_BHWC, one)
    terms = _transform(_B_T, [_every_fourth(padded_BHWC, offset, axis) for offset in range(6)])
    kernels = _transform(_G, [lax.slice_in_dim(kernel, tap, tap + 1, axis=axis - 1) for tap in range(3)])
    how = {"window_strides": (1, 1), "padding": other, "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    products = [lax.conv_general_dilated(x, k, **how) for x, k in zip(terms, kernels, strict=True)]
    y = jnp.stack(_transform(_A_T, products), axis=axis + 1)  # [B, h, 4, W, O] or [B, H, w, 4, O]
    return y.reshape(*x_BHWC.shape[:3], -1)


def kernel_gradient(x_BHWC: Array, dy_BHWO: Array) -> Array:
    """Returns dL/dkernel `[3, 3, C, O]` by (2), summed over strips of rows."""
    batch, height, width, channels = x_BHWC.shape
    features = dy_BHWO.shape[-1]
    dy_BHWO = jnp.pad(dy_BHWO, ((0, 0), (1, 1), (0, 0), (0, 0)))
    row = batch * width * max(channels, features)
    rows = next(rows for rows in range(height, 0, -1) if height % rows == 0 and (rows * row <= _STRIP or rows == 1))
    if rows == height:
        return _kernel_gradient(x_BHWC, dy_BHWO).transpose(1, 2, 0, 3)

    def add(total: Array, first: Array) -> tuple[Array, None]:
        x = lax.dynamic_slice_in_dim(x_BHWC, first, rows, axis=1)
        return total + _kernel_gradient(x, lax.dynamic_slice_in_dim(dy_BHWO, first, rows + 2, axis=1)), None

    zeros_C33O = jnp.zeros((channels, 3, 3, features), x_BHWC.dtype)
    return lax.scan(add, zeros_C33O, jnp.arange(0, height, rows))[0].transpose(1, 2, 0, 3)


def _kernel_gradient(x_BHWC: Array, dy_BHWO: Array) -> Array:
    """`kernel_gradient` of some rows of `x`, `[C, 3, 3, O]`; `dy` has another row on either side."""
    _, height, width, channels = x_BHWC.shape
    # Layouts in which every product below is of two plain row-major matrices; in that of dy the kernel's rows are side by side.
    x_CHWB = jnp.pad(lax.optimization_barrier(x_BHWC.transpose(3, 1, 2, 0)), ((0, 0), (0, 0), (1, 1), (0, 0)))
    x_terms = _transform(_B_T, [_every_fourth(x_CHWB, offset, axis=2) for offset in range(6)])
    dy_BHW3O = jnp.stack([lax.slice_in_dim(dy_BHWO, 2 - row, 2 - row + height, axis=1) for row in range(3)], axis=3)
    dy_HWB3O = dy_BHW3O.transpose(1, 2, 0, 3, 4)
    dy_Hw4B3O = dy_HWB3O.reshape(height, width // 4, 4, *dy_HWB3O.shape[2:])
    dy_terms = _transform(_A, [dy_Hw4B3O[:, :, pixel] for pixel in range(4)])
    # Without the barriers the compiler computes each term again inside the product that reads it.
    x_terms, dy_terms = lax.optimization_barrier((x_terms, dy_terms))

    def product(x_CHwB: Array, dy_HwB3O: Array) -> Array:
        features = dy_HwB3O.shape[3:]
        return (x_CHwB.reshape(channels, -1) @ dy_HwB3O.reshape(-1, np.prod(features))).reshape(channels, *features)

    products_C3O = [product(x, dy) for x, dy in zip(x_terms, dy_terms, strict=True)]
    return jnp.stack(_transform(_G_T, lax.optimization_barrier(products_C3O)), axis=2)


def _every_fourth(x: Array, offset: int, axis: int) -> Array:
    """Pixels offset, offset + 4, ... along an axis that is padded by one pixel on either side."""
    return lax.slice_in_dim(x, offset, offset + x.shape[axis] - 5, stride=4, axis=axis)


def _transform(matrix: tuple[tuple[float, ...], ...], arrays: list[Array]) -> list[Array]:
    """Returns matrix @ arrays as sums of scaled arrays."""
    rows = []
    for row in matrix:
        pairs = [(factor, array) for factor, array in zip(row, arrays, strict=True) if factor]
        terms = [array if factor == 1 else array * np.float32(factor) for factor, array in pairs]
        rows.append(sum(terms[1:], terms[0]))
    return rows
