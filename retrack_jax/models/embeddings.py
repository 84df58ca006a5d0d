"""Embeddings of the timestep, as in diffusers' `embeddings.py`.

    (1) f_i = exp(-log(10000) i / (D/2 - freq_shift)),  i = 0 .. D/2 - 1
    (2) e(t) = [sin(t f), cos(t f)], or [cos(t f), sin(t f)] with flip_sin_to_cos
    (3) e(t) = [sin(2 pi W log t), cos(2 pi W log t)]      W ~ N(0, 16^2), fixed: the "fourier" kind, undefined at t = 0

All of it is in float32, whatever the network's dtype.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax.checks import check_choice
from retrack_jax.notation import Array


@jax.custom_jvp
def silu(x: Array) -> Array:
    """Returns x / (1 + exp(-x)).

    It is a quotient, while `nn.silu` is a product, because of XLA on CPU: XLA stores the result of a division, but computes a
    product again, and with it the norm before, in every operation that reads it. Those are each of the six terms of Winograd's
    convolution and, for every strided pixel, the transpose in the gradient of the kernel. The derivative has a rule because that
    of the quotient is inf / inf below -88.
    """
    return x / (1.0 + jnp.exp(-x))


@silu.defjvp
def _silu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    sigmoid = jax.nn.sigmoid(x)
    return silu(x), dx * (sigmoid * (1.0 + x * (1.0 - sigmoid)))


_ACTIVATIONS = {
    "silu": silu,
    "swish": silu,
    "mish": jax.nn.mish,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "relu": nn.relu,
}


def activation(act_fn: str):
    """Returns the function with diffusers' name `act_fn`; raises `UserError` for an unknown name."""
    check_choice("act_fn", str(act_fn), _ACTIVATIONS)
    return _ACTIVATIONS[act_fn]


def timestep_embedding(t: Array, dim: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0) -> Array:
    """Returns the embedding of `t` `[B]` by equations (1) and (2), float32 `[B, dim]`; an odd `dim` is padded with a zero."""
    half = dim // 2
    # Rounded as in PyTorch (a float32 exponent, then exp): at t = 999, one unit in the last place of f is visible in sin(t f).
    exponent = np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32) / np.float32(half - freq_shift)
    frequencies_D = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angles_BD = t.astype(jnp.float32)[:, None] * jnp.asarray(frequencies_D)[None, :]
    parts = [jnp.sin(angles_BD), jnp.cos(angles_BD)]
    if flip_sin_to_cos:
        parts.reverse()
    if dim % 2:
        parts.append(jnp.zeros((t.shape[0], 1), jnp.float32))
    return jnp.concatenate(parts, axis=-1)


class GaussianFourierProjection(nn.Module):
    """Equation (3): t `[B]` to float32 `[B, 2 * embedding_size]`. Its `weight` is never trained."""

    embedding_size: int
    scale: float = 16.0

    @nn.compact
    def __call__(self, t: Array) -> Array:
        weight = self.param("weight", nn.initializers.normal(self.scale), (self.embedding_size,), jnp.float32)
        weight = jax.lax.stop_gradient(weight)
        angles = jnp.log(t.astype(jnp.float32))[:, None] * weight[None, :] * 2.0 * np.float32(np.pi)
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class TimestepEmbedding(nn.Module):
    """Two dense layers with an activation between them: `[B, D]` to `[B, time_embed_dim]`."""

    time_embed_dim: int
    act_fn: str = "silu"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, t_emb: Array) -> Array:
        hidden = nn.Dense(self.time_embed_dim, dtype=self.dtype, name="linear_1")(t_emb)
        return nn.Dense(self.time_embed_dim, dtype=self.dtype, name="linear_2")(activation(self.act_fn)(hidden))
