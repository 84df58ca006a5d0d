"""A 2-D convolution whose gradients are quick on CPU; TPU and GPU keep XLA's convolution and JAX's gradients.

    y[b, h, w, o] = sum_ijc  x[b, s h + i - p, s w + j - p, c]  K[i, j, c, o]  +  bias[o]                        (1)
    dL/dx         = (dL/dy, s - 1 zeros between its pixels)  convolved with  K flipped in i, j, with c and o swapped  (2)
    dL/dK         = (x with b and c swapped)  convolved with  dL/dy as a kernel of size h x w, s - 1 zeros between  (3)

XLA on CPU has a quick path for convolutions in its canonical layout only (images NHWC, kernels HWIO). JAX's gradients use
other layouts: outside a loop XLA rewrites them, inside `lax.scan` or `while_loop` it does not, and they run up to 150 times
slower (jax issue 12868). So (2) and (3) are written here in the canonical layout, and winograd.py halves the multiplications
of wide 3 x 3 convolutions. The platform is chosen at lowering.

The convolution is a primitive, bilinear in x and K, rather than a `custom_vjp`: that would refuse forward mode, which the
likelihood needs for its divergence. The tangent of (1) is (1) itself, so forward mode is as quick as the value.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from retrack_jax.models.cpu import winograd
from retrack_jax.notation import Array

_Padding = tuple[tuple[int, int], tuple[int, int]]


def _convolve(x_BHWC: Array, kernel: Array, *, strides: int, padding: _Padding, kernel_dilation: int = 1) -> Array:
    """Equation (1) without the bias, in the canonical layout."""
    return lax.conv_general_dilated(
        x_BHWC,
        kernel,
        (strides, strides),
        padding,
        rhs_dilation=(kernel_dilation, kernel_dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _convolve_on_cpu(x_BHWC: Array, kernel: Array, *, strides: int, padding: _Padding) -> Array:
    """Equation (1) without the bias, by the cheaper of two ways."""
    if winograd.pays(x_BHWC.shape, kernel.shape, strides, padding, x_BHWC.dtype):
        return winograd.convolve(x_BHWC, kernel)
    return _convolve(x_BHWC, kernel, strides=strides, padding=padding)


def _grad_x_on_cpu(dy_BHWO: Array, kernel: Array, *, x_shape: tuple[int, ...], strides: int, padding: _Padding) -> Array:
    """Equation (2): dL/dx of shape `x_shape`."""
    flipped_kernel = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    spread = [(0, 0, 0)]
    for axis, (before, _) in enumerate(padding):
        size, length = kernel.shape[axis], dy_BHWO.shape[axis + 1]
        low = size - 1 - before
        high = x_shape[axis + 1] + before - 1 - strides * (length - 1)
        spread.append((low, high, strides - 1))
    spread.append((0, 0, 0))
    if strides == 1:
        return _convolve_on_cpu(dy_BHWO, flipped_kernel, strides=1, padding=tuple((low, high) for low, high, _ in spread[1:3]))
    return _convolve(lax.pad(dy_BHWO, jnp.zeros((), dy_BHWO.dtype), spread), flipped_kernel, strides=1, padding=((0, 0),) * 2)


def _grad_k_on_cpu(x_BHWC: Array, dy_BHWO: Array, *, kernel_shape: tuple[int, ...], strides: int, padding: _Padding) -> Array:
    """Equation (3): dL/dK of shape `kernel_shape`."""
    if kernel_shape[:2] == (1, 1) and strides == 1 and padding == ((0, 0),) * 2:
        return lax.dot_general(x_BHWC, dy_BHWO, (((0, 1, 2), (0, 1, 2)), ((), ())))[None, None]
    if winograd.pays(x_BHWC.shape, kernel_shape, strides, padding, x_BHWC.dtype):
        return winograd.kernel_gradient(x_BHWC, dy_BHWO)
    # The last rows and columns that no stride reaches are cut; otherwise the result would be larger than the kernel.
    reach = []
    for axis, (before, _) in enumerate(padding):
        used = strides * (dy_BHWO.shape[axis + 1] - 1) + kernel_shape[axis]
        reach.append((before, used - before - x_BHWC.shape[axis + 1]))
    x_CHWB = x_BHWC.transpose(3, 1, 2, 0)
    dy_HWBO = dy_BHWO.transpose(1, 2, 0, 3)
    gradient = _convolve(x_CHWB, dy_HWBO, strides=1, padding=tuple(reach), kernel_dilation=strides)
    return gradient.transpose(1, 2, 0, 3)


_conv_p = Primitive("retrack_conv")
_conv_p.def_impl(jax.jit(_conv_p.bind, static_argnames=("strides", "padding")))
mlir.register_lowering(_conv_p, mlir.lower_fun(_convolve, multiple_results=False))
mlir.register_lowering(_conv_p, mlir.lower_fun(_convolve_on_cpu, multiple_results=False), platform="cpu")


@_conv_p.def_abstract_eval
def _abstract_eval(x: jax.core.ShapedArray, kernel: jax.core.ShapedArray, **params) -> jax.core.ShapedArray:
    size = [
        (length + sum(pad) - side) // params["strides"] + 1
        for length, side, pad in zip(x.shape[1:3], kernel.shape[:2], params["padding"], strict=True)
    ]
    return jax.core.ShapedArray((x.shape[0], *size, kernel.shape[-1]), x.dtype)


# Under `jit` because a network has many convolutions of few shapes: each gradient is traced and lowered once.
@partial(jax.jit, static_argnames=("x_shape", "strides", "padding"))
def _grad_x(dy: Array, kernel: Array, *, x_shape: tuple[int, ...], **params) -> Array:
    def own(dy, kernel):
        x = jax.ShapeDtypeStruct(x_shape, dy.dtype)
        return jax.linear_transpose(lambda x: _convolve(x, kernel, **params), x)(dy)[0]

    return lax.platform_dependent(dy, kernel, cpu=partial(_grad_x_on_cpu, x_shape=x_shape, **params), default=own)


@partial(jax.jit, static_argnames=("kernel_shape", "strides", "padding"))
def _grad_k(x: Array, dy: Array, *, kernel_shape: tuple[int, ...], **params) -> Array:
    def own(x, dy):
        kernel = jax.ShapeDtypeStruct(kernel_shape, dy.dtype)
        return jax.linear_transpose(lambda kernel: _convolve(x, kernel, **params), kernel)(dy)[0]

    return lax.platform_dependent(x, dy, cpu=partial(_grad_k_on_cpu, kernel_shape=kernel_shape, **params), default=own)


def _transpose_to_input(dy: Array, x: ad.UndefinedPrimal, kernel: Array, **params) -> Array:
    return _grad_x(dy, kernel, x_shape=x.aval.shape, **params)


def _transpose_to_kernel(dy: Array, x: Array, kernel: ad.UndefinedPrimal, **params) -> Array:
    return _grad_k(x, dy, kernel_shape=kernel.aval.shape, **params)


ad.defbilinear(_conv_p, _transpose_to_input, _transpose_to_kernel)


def _batch(args: tuple[Array, Array], axes: tuple[int | None, int | None], **params) -> tuple[Array, int]:
    x, kernel = args
    if axes[1] is not None:  # a kernel for each element: XLA's grouped convolution
        return jax.vmap(partial(_convolve, **params), axes)(x, kernel), 0
    x = jnp.moveaxis(x, axes[0], 0)
    y = _conv_p.bind(x.reshape(-1, *x.shape[2:]), kernel, **params)
    return y.reshape(*x.shape[:2], *y.shape[1:]), 0


batching.primitive_batchers[_conv_p] = _batch


def conv(x: Array, kernel: Array, *, strides: int, padding: _Padding) -> Array:
    """Equation (1) without the bias: `x` `[B, H, W, C]`, `kernel` `[kh, kw, C, O]` of one dtype, to `[B, H', W', O]`.

    `padding` is the zeros ((top, bottom), (left, right)). Differentiates in both modes, batches over either argument.
    """
    return _conv_p.bind(x, kernel, strides=strides, padding=padding)
