"""The transformer over the pixels of a feature map by which Stable Diffusion's UNet is conditioned, as in diffusers.

    (1) y        = x + proj_out(blocks(proj_in(norm(x))))                pixels are the tokens
    (2) h_1      = h   + self_attention(norm1(h))                        one block
        h_2      = h_1 + cross_attention(norm2(h_1), prompt)
        h_3      = h_2 + geglu(norm3(h_2))
    (3) geglu(h) = W_2 (a * gelu(g)),   [a, g] = W_1 h                   gelu exact

The functions are submodules under diffusers' names.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from retrack_jax.models.attention import Attention, GroupNorm
from retrack_jax.models.conv import Conv
from retrack_jax.models.layer_norm import LayerNorm
from retrack_jax.notation import Array


class GEGLU(nn.Module):
    """Equation (3) without its last layer, four times wider than `h`."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, h: Array) -> Array:
        a, gate = jnp.split(nn.Dense(8 * h.shape[-1], dtype=self.dtype, name="proj")(h), 2, axis=-1)
        return a * jax.nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """Equation (3), or the same with another first layer: `inner(dtype)` makes it."""

    dtype: jnp.dtype = jnp.float32
    inner: type[nn.Module] = GEGLU

    @nn.compact
    def __call__(self, h: Array) -> Array:
        return nn.Dense(h.shape[-1], dtype=self.dtype, name="net_2")(self.inner(self.dtype, name="net_0")(h))


class BasicTransformerBlock(nn.Module):
    """Equation (2) for tokens `[B, N, D]` and a prompt `[B, M, E]`."""

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, h: Array, encoder_hidden_states: Array) -> Array:
        def attention(name: str) -> Attention:
            return Attention(self.heads, h.shape[-1] // self.heads, dtype=self.dtype, name=name)

        h = h + attention("attn1")(LayerNorm(dtype=self.dtype, name="norm1")(h))
        h = h + attention("attn2")(LayerNorm(dtype=self.dtype, name="norm2")(h), encoder_hidden_states)
        return h + FeedForward(self.dtype, name="ff")(LayerNorm(dtype=self.dtype, name="norm3")(h))


class Transformer2DModel(nn.Module):
    """Equation (1): `[B, H, W, C]` and a prompt `[B, M, E]` to `[B, H, W, C]`.

    Attributes:
      heads: number of heads; each has C / heads channels.
      norm_num_groups: groups of the first norm.
      use_linear_projection: whether proj_in and proj_out are dense layers (Stable Diffusion 2) or 1 x 1 convolutions
        (1.x). Both compute the same; the shapes of their weights differ.
      dtype, remat: as in `models.unet.UNet`.
    """

    heads: int
    num_layers: int = 1
    norm_num_groups: int = 32
    use_linear_projection: bool = False
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array, encoder_hidden_states: Array) -> Array:
        batch, height, width, channels = x.shape

        def project(name: str, h: Array) -> Array:
            if self.use_linear_projection:
                return nn.Dense(channels, dtype=self.dtype, name=name)(h)
            return Conv(channels, kernel_size=1, padding=0, dtype=self.dtype, name=name)(h)

        h = GroupNorm(self.norm_num_groups, 1e-6, self.dtype, name="norm")(x)
        h = project("proj_in", h).reshape(batch, height * width, channels)
        block = nn.remat(BasicTransformerBlock) if self.remat else BasicTransformerBlock
        for i in range(self.num_layers):
            h = block(self.heads, self.dtype, name=f"transformer_blocks_{i}")(h, encoder_hidden_states)
        return x.astype(h.dtype) + project("proj_out", h.reshape(x.shape))
