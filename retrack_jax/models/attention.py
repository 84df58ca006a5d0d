"""Group normalization and attention, as in diffusers' `Attention` with its default processor.

    (1) GroupNorm: y = (x - mean_g) / sqrt(var_g + eps) * scale + bias, over the pixels and channels of group g
    (2) attention: softmax(q k^T / sqrt(dim_head)) v, for each head; the softmax in float32

The pixels of an image are its tokens.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from retrack_jax.models.flash_attention import attend
from retrack_jax.notation import Array


class GroupNorm(nn.Module):
    """Equation (1) over `[B, ..., C]`, C channels in contiguous groups; statistics in float32, result in `dtype`.

    Mean and variance come from one pass over x - s, with a shift s near the mean of the group: without the shift, E[x^2] - E[x]^2
    would lose the digits that parity with PyTorch needs. The result does not depend on s, so s has no gradient.
    """

    num_groups: int
    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        scale_C = self.param("scale", nn.initializers.ones_init(), (channels,), jnp.float32).astype(jnp.float32)
        bias_C = self.param("bias", nn.initializers.zeros_init(), (channels,), jnp.float32).astype(jnp.float32)
        return _group_norm(x, scale_C, bias_C, self.num_groups, self.epsilon, self.dtype)


# Under `jit`, so that each shape is traced and lowered once: a network has fifty norms of a dozen shapes.
@partial(jax.jit, static_argnums=(3, 4, 5))
def _group_norm(x: Array, scale_C: Array, bias_C: Array, groups: int, epsilon: float, dtype: jnp.dtype) -> Array:
    batch, channels = x.shape[0], x.shape[-1]
    size = channels // groups

    def group_mean(y_BC: Array) -> Array:
        y_BG1 = jnp.mean(y_BC.reshape(batch, groups, size), axis=-1, keepdims=True)
        return jnp.broadcast_to(y_BG1, (batch, groups, size)).reshape(batch, channels)

    x_BNC = x.astype(jnp.float32).reshape(batch, -1, channels)
    shift_BC = group_mean(jax.lax.stop_gradient(x_BNC[:, x_BNC.shape[1] // 2]))
    x_BNC = x_BNC - shift_BC[:, None, :]
    # Over the pixels first: on CPU, a sum that keeps the channels apart is vectorized; one over pixels and channels is not.
    mean_BC = group_mean(jnp.mean(x_BNC, axis=1))
    var_BC = group_mean(jnp.mean(jnp.square(x_BNC), axis=1)) - jnp.square(mean_BC)
    gain_BC = jax.lax.rsqrt(jnp.maximum(var_BC, 0.0) + epsilon) * scale_C[None, :]
    y_BNC = x_BNC * gain_BC[:, None, :] + (bias_C[None, :] - mean_BC * gain_BC)[:, None, :]
    return y_BNC.reshape(x.shape).astype(dtype)


class KeyProjection(nn.Module):
    """`nn.Dense` for the keys. The bias is a parameter, because diffusers has one, but it is not added.

    It would add the same number, q b, to all logits of a row of the softmax, which cancels. So its true gradient is 0. Computed,
    it would be rounding noise that differs from one layout of devices to another, and AdamW would turn it into steps of full
    size.
    """

    features: int
    use_bias: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, y: Array) -> Array:
        """Maps `[B, M, D]` to `[B, M, features]`."""
        kernel = self.param("kernel", nn.linear.default_kernel_init, (y.shape[-1], self.features), jnp.float32)
        if self.use_bias:
            self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
        return jnp.matmul(y.astype(self.dtype), kernel.astype(self.dtype))


class Attention(nn.Module):
    """Multi-head attention over the pixels of `[B, H, W, C]` or the tokens of `[B, N, C]`; the result has the shape of the input.

    Attributes:
      heads: number of heads; the inner width is heads * dim_head, and need not be C.
      dim_head: channels per head.
      bias: whether to_q, to_k and to_v have a bias (to_out_0 always has one); to_k's changes nothing (see `KeyProjection`).
      norm_num_groups: groups of the group norm before the attention, or None for no norm.
      eps: the epsilon of that norm.
      residual_connection: whether the input is added to the result.
      rescale_output_factor: what the sum is divided by.
      dtype: the dtype of the computation; parameters, norm statistics and softmax stay float32.
    """

    heads: int
    dim_head: int
    bias: bool = False
    norm_num_groups: int | None = None
    eps: float = 1e-5
    residual_connection: bool = False
    rescale_output_factor: float = 1.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, encoder_hidden_states: Array | None = None) -> Array:
        """Attends from `x` to `encoder_hidden_states` `[B, M, D]`, or to `x` itself if that is None."""
        batch, channels = x.shape[0], x.shape[-1]
        hidden_BNC = x.reshape(batch, -1, channels)
        if self.norm_num_groups is not None:
            hidden_BNC = GroupNorm(self.norm_num_groups, self.eps, self.dtype, name="group_norm")(hidden_BNC)
        context = hidden_BNC if encoder_hidden_states is None else encoder_hidden_states
        inner = self.heads * self.dim_head

        def project(name: str, y: Array) -> Array:
            layer = KeyProjection if name == "to_k" else nn.Dense
            y = layer(inner, use_bias=self.bias, dtype=self.dtype, name=name)(y)
            return y.reshape(batch, y.shape[1], self.heads, self.dim_head)

        query, key, value = project("to_q", hidden_BNC), project("to_k", context), project("to_v", context)
        hidden = attend(query, key, value).reshape(batch, -1, inner)
        hidden = nn.Dense(channels, dtype=self.dtype, name="to_out_0")(hidden)
        hidden = hidden.reshape(x.shape)
        if self.residual_connection:
            hidden = hidden + x.astype(hidden.dtype)
        return hidden if self.rescale_output_factor == 1.0 else hidden / self.rescale_output_factor
