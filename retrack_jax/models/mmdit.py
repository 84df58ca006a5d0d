"""Stable Diffusion 3's transformer, as diffusers' `SD3Transformer2DModel` (MMDiT, arXiv 2403.03206).

    (1) h_0 = W patches(x_t) + positions,   e_0 = W_e prompt         tokens of the image and of the prompt, of one width
    (2) c   = time(t) + text(pooled prompt),   [b_1, s_1, g_1, b_2, s_2, g_2] = W_c silu(c)      for h and for e in each block
        [a, a_e] = attention([(1 + s_1) norm(h) + b_1, (1 + s_1') norm(e) + b_1'])               one softmax over both
        h'  = h  + g_1 a (+ g_3 attention((1 + s_3) norm(h) + b_3) in dual_attention_layers)
        h'' = h' + g_2 mlp((1 + s_2) norm(h') + b_2),   and e'' in the same way, but in the last block, which drops e
    (3) patches(out) = W_o ((1 + s) norm(h) + b),   [s, b] = W_s silu(c)

Positions are equation (4) of dit.py on a square of `pos_embed_max_size` patches a side. They are stored in a checkpoint, and an
image takes the middle of them. Keys have a bias that counts here, since those of the image and of the prompt are different.
"""

from collections.abc import Mapping
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax.checks import check, check_choice
from retrack_jax.models.attention import KeyProjection
from retrack_jax.models.config_format import Configured
from retrack_jax.models.dit import GELU, TIME_WIDTH, from_patches, modulated, of_patches, to_patches
from retrack_jax.models.embeddings import TimestepEmbedding, silu, timestep_embedding
from retrack_jax.models.flash_attention import attend
from retrack_jax.models.layer_norm import RMSNorm
from retrack_jax.models.transformer2d import FeedForward
from retrack_jax.notation import Array

_EPS = 1e-6  # of every norm
RMS_NORM = "rms_norm"


class MMDiT(Configured, nn.Module):
    """Maps x_t `[B, H, W, in_channels]`, t `[B]` and a prompt to float32 `[B, H, W, out_channels]`.

    Attributes:
      joint_attention_dim: features of a prompt's tokens.
      pooled_projection_dim: features of the pooled prompt.
      caption_projection_dim: the width of the prompt's tokens inside, which is that of the image's.
      dual_attention_layers: the blocks that have a second attention, of the image alone.
      qk_norm: "rms_norm", or None.
      dtype, remat: as in `models.unet.UNet`.
      The others are diffusers'.
    """

    class_name = "SD3Transformer2DModel"

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int | None = 16
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **own_fields) -> Self:
        dual = config.get("dual_attention_layers") or ()
        whole = isinstance(dual, (list, tuple)) and all(type(layer) is int and layer >= 0 for layer in dual)
        check(whole, f"the {cls.class_name} config's dual_attention_layers is {dual!r:.200}; it must list blocks")
        rest = {name: value for name, value in config.items() if name != "dual_attention_layers"}
        return super().from_config(rest, dual_attention_layers=tuple(dual), **own_fields)

    def check_options(self) -> None:
        """Raises `UserError`, naming the field, for options that make no network."""
        check_choice("qk_norm", str(self.qk_norm), ("None", RMS_NORM))
        width = self._width
        check(width % 4 == 0, f"num_attention_heads x attention_head_dim is {width}; 4 must divide it, for the positions")
        same = self.caption_projection_dim == width
        check(same, f"caption_projection_dim is {self.caption_projection_dim}; it must be the image's width, {width}")

    @property
    def _width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def smallest_condition(self) -> dict[str, Array]:
        """A prompt of one token for one image, as `__call__` takes it."""
        states, pooled = jnp.zeros((1, 1, self.joint_attention_dim)), jnp.zeros((1, self.pooled_projection_dim))
        return {"encoder_hidden_states": states, "text_embeds": pooled}

    @nn.compact
    def __call__(self, x_t: Array, t: Array, condition: dict[str, Array], deterministic: bool = True) -> Array:
        """Returns the prediction for noisy latents.

        `condition` is the prompt's embedding `encoder_hidden_states` `[B, M, joint_attention_dim]`, and the pooled one
        `text_embeds` `[B, pooled_projection_dim]`. Each may also be one for all images, `[1, ...]`.
        """
        (batch, height, width, takes), patch = x_t.shape, self.patch_size
        rows, columns, channels = height // patch, width // patch, self.out_channels or self.in_channels
        prompt, pooled = condition["encoder_hidden_states"], condition["text_embeds"]
        check(
            (rows * patch, columns * patch, takes) == (height, width, self.in_channels),
            f"x_t has shape {x_t.shape}; the transformer needs {self.in_channels} channels and sides that {patch} divides",
        )
        check(
            prompt.shape[2] == self.joint_attention_dim and pooled.shape[1] == self.pooled_projection_dim,
            f"encoder_hidden_states and text_embeds have shapes {prompt.shape} and {pooled.shape}; they need "
            f"{self.joint_attention_dim} and {self.pooled_projection_dim} features",
        )
        h = PatchEmbed(self._width, patch, self.pos_embed_max_size, self.sample_size // patch, self.dtype, name="pos_embed")(x_t)
        c = TimeTextEmbedding(self._width, self.dtype, name="time_text_embed")(t, pooled.astype(self.dtype))
        e = nn.Dense(self._width, dtype=self.dtype, name="context_embedder")(prompt.astype(self.dtype))
        e = jnp.broadcast_to(e, (batch, *e.shape[1:]))
        block, last = nn.remat(Block) if self.remat else Block, self.num_layers - 1
        for i in range(self.num_layers):
            fields = self.num_attention_heads, i == last, i in self.dual_attention_layers, self.qk_norm, self.dtype
            h, e = block(*fields, name=f"transformer_blocks_{i}")(h, e, c)
        scale, shift = Modulation(2, self.dtype, name="norm_out")(c)
        h = nn.Dense(patch * patch * channels, dtype=self.dtype, name="proj_out")(modulated(h, shift, scale, _EPS))
        return from_patches(h, (height, width), patch).astype(jnp.float32)


class PatchEmbed(nn.Module):
    """h_0 of equation (1); the stored positions are of `most` patches a side, and none of them is trained."""

    width: int
    patch: int
    most: int
    base: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        rows, columns = x.shape[1] // self.patch, x.shape[2] // self.patch
        check(max(rows, columns) <= self.most, f"the latents have {rows} x {columns} patches, and the network {self.most} a side")
        tokens = of_patches(self.width, self.dtype)(to_patches(x, self.patch))
        stored = self.param("pos_embed", lambda _: _positions(self.width, self.most, self.base))
        grid = jax.lax.stop_gradient(stored).reshape(self.most, self.most, self.width)
        top, left = (self.most - rows) // 2, (self.most - columns) // 2
        cut = grid[top : top + rows, left : left + columns].reshape(1, rows * columns, self.width)
        return tokens + jnp.broadcast_to(cut.astype(self.dtype), tokens.shape)


class TimeTextEmbedding(nn.Module):
    """c of equation (2): t `[B]` and the pooled prompt `[B or 1, P]` to `[B, width]`."""

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, t: Array, pooled: Array) -> Array:
        time = TimestepEmbedding(self.width, dtype=self.dtype, name="timestep_embedder")
        text = TimestepEmbedding(self.width, dtype=self.dtype, name="text_embedder")
        return time(timestep_embedding(t, TIME_WIDTH).astype(self.dtype)) + text(pooled)


class Modulation(nn.Module):
    """`parts` vectors of the width of c, from W silu(c)."""

    parts: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, c: Array) -> list[Array]:
        linear = nn.Dense(self.parts * c.shape[-1], dtype=self.dtype, name="linear")
        return jnp.split(linear(silu(c)), self.parts, axis=-1)


class Block(nn.Module):
    """Equation (2): tokens h `[B, N, D]` and e `[B, M, D]`, and c `[B, D]`, to h'' and e''; in the last block e'' is None."""

    heads: int
    is_last: bool
    is_dual: bool
    qk_norm: str | None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, h: Array, e: Array, c: Array) -> tuple[Array, Array | None]:
        own = self.heads, self.qk_norm, self.dtype
        b_1, s_1, g_1, b_2, s_2, g_2, *second = Modulation(9 if self.is_dual else 6, self.dtype, name="norm1")(c)
        if self.is_last:
            s_e, b_e = Modulation(2, self.dtype, name="norm1_context")(c)
        else:
            b_e, s_e, *after = Modulation(6, self.dtype, name="norm1_context")(c)
        a, a_e = JointAttention(*own, name="attn")(modulated(h, b_1, s_1, _EPS), modulated(e, b_e, s_e, _EPS), self.is_last)
        before, h = h, h + g_1[:, None] * a
        if self.is_dual:
            b_3, s_3, g_3 = second
            h = h + g_3[:, None] * JointAttention(*own, name="attn2")(modulated(before, b_3, s_3, _EPS))[0]
        h = h + g_2[:, None] * FeedForward(self.dtype, GELU, name="ff")(modulated(h, b_2, s_2, _EPS))
        if self.is_last:
            return h, None
        g_e, b_m, s_m, g_m = after
        e = e + g_e[:, None] * a_e
        return h, e + g_m[:, None] * FeedForward(self.dtype, GELU, name="ff_context")(modulated(e, b_m, s_m, _EPS))


class JointAttention(nn.Module):
    """The attention of equation (2), of tokens `[B, N, D]` and `[B, M, D]`, or of the first alone."""

    heads: int
    qk_norm: str | None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, h: Array, e: Array | None = None, drops_e: bool = False) -> tuple[Array, Array | None]:
        width, tokens = h.shape[-1], h.shape[1]
        cancels = e is None and self.qk_norm is None  # the bias of the keys, as `KeyProjection` explains

        def project(name: str, x: Array, norm: str = "") -> Array:
            layer = KeyProjection if name == "to_k" and cancels else nn.Dense
            y = layer(width, use_bias=True, dtype=self.dtype, name=name)(x)
            y = y.reshape(*y.shape[:2], self.heads, width // self.heads)
            return RMSNorm(_EPS, self.dtype, name=norm)(y) if norm and self.qk_norm else y

        q, k, v = project("to_q", h, "norm_q"), project("to_k", h, "norm_k"), project("to_v", h)
        if e is not None:
            q = jnp.concatenate([q, project("add_q_proj", e, "norm_added_q")], axis=1)
            k = jnp.concatenate([k, project("add_k_proj", e, "norm_added_k")], axis=1)
            v = jnp.concatenate([v, project("add_v_proj", e)], axis=1)
        both = attend(q, k, v)
        both = both.reshape(*both.shape[:2], width)
        out = nn.Dense(width, dtype=self.dtype, name="to_out_0")(both[:, :tokens])
        if e is None or drops_e:
            return out, None
        return out, nn.Dense(width, dtype=self.dtype, name="to_add_out")(both[:, tokens:])


def _positions(width: int, grid: int, base: int) -> Array:
    """Equation (4) of dit.py, float32 `[1, grid^2, width]`, not computed while shapes are asked: full size takes 0.9 GB."""
    frequencies = jnp.asarray(1 / 10000 ** (np.arange(width // 4) / (width / 4)), jnp.float32)
    angles = jnp.arange(grid, dtype=jnp.float32)[:, None] * (base / grid) * frequencies[None]
    one_axis = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
    column, row = jnp.tile(one_axis, (grid, 1)), jnp.repeat(one_axis, grid, axis=0)
    return jnp.concatenate([column, row], axis=1)[None]
