"""Normalization over the last axis with statistics in float32, for activations and parameters of any dtype."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from retrack_jax.notation import Array


class LayerNorm(nn.Module):
    """y = (x - mean) / sqrt(var + epsilon) * scale + bias over the last axis; the result in `dtype`.

    Flax's layer takes E[x²] - E[x]² by default, which loses the digits that parity with PyTorch needs, and mixes dtypes
    implicitly.
    """

    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (1,) * (x.ndim - 1) + (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), jnp.float32).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],), jnp.float32).astype(jnp.float32)
        x = x.astype(jnp.float32)
        centered = x - x.mean(axis=-1, keepdims=True)
        var = jnp.square(centered).mean(axis=-1, keepdims=True)
        return (centered * jax.lax.rsqrt(var + self.epsilon) * scale.reshape(shape) + bias.reshape(shape)).astype(self.dtype)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + epsilon) * scale over the last axis; the result in `dtype`."""

    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), jnp.float32).astype(jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + self.epsilon)
        return (x * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(self.dtype)
