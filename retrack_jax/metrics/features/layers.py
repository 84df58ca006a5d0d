"""What the imported feature networks share: frozen batch normalization and PyTorch's convolutions and pools."""

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from retrack_jax.notation import Array


class BatchNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis.

    Attributes:
      eps: added to the variance.
      batch_statistics: take mean and (biased) variance from the batch, as a PyTorch network left in training mode does.
    """

    eps: float
    batch_statistics: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        zeros, ones, shape = nn.initializers.zeros_init(), nn.initializers.ones_init(), (x.shape[-1],)
        scale, bias = self.param("scale", ones, shape), self.param("bias", zeros, shape)
        mean, var = self.param("mean", zeros, shape), self.param("var", ones, shape)
        if self.batch_statistics:
            axes = tuple(range(x.ndim - 1))
            mean, var = jnp.mean(x, axes), jnp.var(x, axes)
        factor = scale * lax.rsqrt(var + self.eps)
        factor, offset = (jnp.broadcast_to(one, x.shape) for one in (factor, bias - mean * factor))
        return x * factor + offset


def conv(
    features: int, size: int | tuple[int, int], strides: int = 1, padding: int | tuple[int, int] = 0, name: str | None = None
):
    """Returns a convolution without bias, with PyTorch's symmetric padding."""
    size, padding = ((value, value) if isinstance(value, int) else value for value in (size, padding))
    pads = tuple((pad, pad) for pad in padding)
    return nn.Conv(features, size, strides=strides, padding=pads, use_bias=False, name=name)


def max_pool(x: Array, size: int, strides: int, padding: int = 0) -> Array:
    """Returns the maximum over windows; the padding never wins."""
    return nn.max_pool(x, (size, size), (strides, strides), ((padding, padding),) * 2)


def avg_pool_3x3(x: Array) -> Array:
    """Returns 3 x 3 averages at stride 1 that leave the padding out of the count, as TensorFlow's do."""
    window, pads = (1, 3, 3, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    total = lax.reduce_window(x, jnp.zeros((), x.dtype), lax.add, window, (1, 1, 1, 1), pads)
    count = lax.reduce_window(
        jnp.ones((1, *x.shape[1:3], 1), x.dtype), jnp.zeros((), x.dtype), lax.add, window, (1, 1, 1, 1), pads
    )
    return total / jnp.broadcast_to(count, total.shape)
