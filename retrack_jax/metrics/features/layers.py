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
    size = (size, size) if isinstance(size, int) else size
    return nn.Conv(features, size, strides=strides, padding=padding, use_bias=False, name=name)


def max_pool(x: Array, strides: int, padding: int = 0) -> Array:
    """Returns the maximum over windows of 3 x 3; the padding never wins."""
    return nn.max_pool(x, (3, 3), (strides, strides), ((padding, padding),) * 2)


def avg_pool(x: Array) -> Array:
    """Returns 3 x 3 averages at stride 1 that leave the padding out of the count, as TensorFlow's do."""
    return nn.avg_pool(x, (3, 3), padding=((1, 1), (1, 1)), count_include_pad=False)
