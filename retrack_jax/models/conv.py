"""The convolution layer: PyTorch's padding convention and Flax's parameter names.

`conv` is `lax.conv_general_dilated` with JAX's gradients on TPU and GPU; models/cpu/conv.py says what differs on CPU.
"""

import flax.linen as nn
import jax.numpy as jnp

from retrack_jax.models.cpu.conv import conv
from retrack_jax.notation import Array


class Conv(nn.Module):
    """Convolution over `[B, H, W, C]`: parameters `kernel` `[kh, kw, in, out]` and `bias` `[out]`.

    Attributes:
      features: output channels.
      kernel_size: side of the square kernel.
      strides: the same stride along both axes.
      padding: pixels of zeros on every side, or ((top, bottom), (left, right)).
      dtype: the dtype that the convolution computes in; parameters stay float32.
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    padding: int | tuple[tuple[int, int], tuple[int, int]] = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        pair = (self.padding, self.padding)
        padding = (pair, pair) if isinstance(self.padding, int) else tuple(tuple(side) for side in self.padding)
        y = conv(x.astype(self.dtype), kernel.astype(self.dtype), strides=self.strides, padding=padding)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
        return y + jnp.broadcast_to(bias.astype(self.dtype), y.shape)
