"""Diffusion transformers, as diffusers' `DiTTransformer2DModel` (arXiv 2212.09748).

    (1) h_0 = W patches(x_t) + positions                                one token for each patch, row by row
    (2) c   = time(t) + class(y),   [b_1, s_1, g_1, b_2, s_2, g_2] = W_c silu(c)     in each block anew (adaLN-zero)
        h'  = h  + g_1 attention((1 + s_1) norm(h) + b_1)
        h'' = h' + g_2 mlp((1 + s_2) norm(h') + b_2)                    mlp(h) = W_2 gelu(W_1 h), gelu by its tanh formula
    (3) patches(out) = W_o ((1 + s) norm(h) + b),   [b, s] = W_s silu(c) with c of the first block
    (4) positions: [sin(x w), cos(x w), sin(y w), cos(y w)],   w_i = 10000^(-4i/D),   column x and row y of the patch

Labels are 0 to N - 1, and N is the null label, of classifier-free guidance. A network of one label, N = 1, is unconditional here.
With twice as many output channels as input channels, the others are what the network says of the variance.
"""

import functools
from collections.abc import Mapping
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax.checks import UserError, check
from retrack_jax.models.attention import Attention
from retrack_jax.models.config_format import Configured
from retrack_jax.models.embeddings import TimestepEmbedding, silu, timestep_embedding
from retrack_jax.models.transformer2d import FeedForward
from retrack_jax.notation import Array

TIME_WIDTH = 256
# The class that diffusers wrote such configs of before version 0.29, and its options that must be off.
_FORMER_CLASS = "Transformer2DModel"
_FORMER_OPTIONS = ("cross_attention_dim", "num_vector_embeds", "only_cross_attention", "use_linear_projection")
_ZEROS = {"kernel_init": nn.initializers.zeros_init()}
_FIXED = {
    "activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero", "norm_elementwise_affine": False, "dropout": 0.0,
}  # fmt: skip


class DiT(Configured, nn.Module):
    """Maps x_t `[B, S, S, in_channels]`, t `[B]` and labels int32 `[B]` to float32 `[B, S, S, out_channels]`.

    New parameters are drawn as in the paper where it matters: modulations and the output start at zero, so that each block starts
    as the identity.

    Attributes:
      sample_size: S that the positions are made for; those of another square image are spread over the same range.
      num_embeds_ada_norm: N, the labels without the null label.
      dtype, remat: as in `models.unet.UNet`.
      The others are diffusers'.
    """

    class_name, fixed = "DiTTransformer2DModel", _FIXED
    passed_over = ("upcast_attention", "norm_num_groups")

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = None
    num_layers: int = 28
    attention_bias: bool = True
    sample_size: int = 32
    patch_size: int = 2
    num_embeds_ada_norm: int = 1000
    norm_eps: float = 1e-5
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **own_fields) -> Self:
        if config.get("_class_name") == _FORMER_CLASS and config.get("norm_type") == "ada_norm_zero":
            on = [name for name in _FORMER_OPTIONS if config.get(name)]
            check(not on, f"the {_FORMER_CLASS} config sets {', '.join(on)}, which a DiT does not have")
            config = {name: value for name, value in config.items() if name not in _FORMER_OPTIONS}
            config = config | {"_class_name": cls.class_name}
        return super().from_config(config, **own_fields)

    def check_options(self) -> None:
        """Raises `UserError`, naming the field, for options that make no network."""
        if self._width % 4:
            raise UserError(f"num_attention_heads x attention_head_dim is {self._width}; 4 must divide it, for the positions")
        whole = self.sample_size % self.patch_size == 0
        check(whole, f"patch_size is {self.patch_size}; it must divide sample_size, {self.sample_size}")

    @property
    def _width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def num_labels(self) -> int | None:
        """How many labels the network knows, the null label included; None: it is unconditional."""
        return None if self.num_embeds_ada_norm == 1 else self.num_embeds_ada_norm + 1

    @property
    def smallest_label(self) -> tuple[Array, ...]:
        """The label for one image, the smallest that `init` takes; nothing if the network is unconditional."""
        return () if self.num_labels is None else (jnp.zeros((1,), jnp.int32),)

    @nn.compact
    def __call__(self, x_t: Array, t: Array, label: Array | None = None, deterministic: bool = True) -> Array:
        side, patch, channels = x_t.shape[1], self.patch_size, self.out_channels or self.in_channels
        fits = x_t.ndim == 4 and x_t.shape[1:] == (side, side, self.in_channels) and side % patch == 0
        check(fits, f"x_t has shape {x_t.shape}; DiT needs squares [B, S, S, {self.in_channels}] of patches of {patch} pixels")
        if self.num_labels is None:
            label = jnp.zeros(t.shape, jnp.int32)
        check(label is not None, f"the network takes a label from 0 to {self.num_embeds_ada_norm} for each image")
        h = PatchEmbed(self._width, patch, self.sample_size // patch, self.dtype, name="pos_embed")(x_t)
        block = nn.remat(Block) if self.remat else Block
        fields = self.num_attention_heads, self.num_embeds_ada_norm, self.attention_bias, self.norm_eps, self.dtype
        conditions = []
        for i in range(self.num_layers):
            h, c = block(*fields, name=f"transformer_blocks_{i}")(h, t, label)
            conditions.append(c)
        last = nn.Dense(2 * self._width, dtype=self.dtype, name="proj_out_1", **_ZEROS)
        h = modulated(h, *jnp.split(last(silu(conditions[0])), 2, axis=-1), 1e-6)
        h = nn.Dense(patch * patch * channels, dtype=self.dtype, name="proj_out_2", **_ZEROS)(h)
        return from_patches(h, (side, side), patch).astype(jnp.float32)


def to_patches(x: Array, patch: int) -> Array:
    """Returns the patches of images `[B, H, W, C]`, row by row, `[B, (H/p)(W/p), p, p, C]`."""
    rows, columns, channels = x.shape[1] // patch, x.shape[2] // patch, x.shape[3]
    blocks = x.reshape(-1, rows, patch, columns, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(-1, rows * columns, patch, patch, channels)


def of_patches(width: int, dtype: jnp.dtype) -> nn.Module:
    """Returns the convolution of patches as a matrix product; its kernel `[p, p, C, D]` is that of the convolution."""
    return nn.DenseGeneral(width, axis=(-3, -2, -1), dtype=dtype, name="proj")


def from_patches(patches: Array, size: tuple[int, int], patch: int) -> Array:
    """Returns images of `size` (H, W) from their patches `[B, (H/p)(W/p), p p C]`, row by row."""
    (height, width), channels = size, patches.shape[-1] // patch**2
    blocks = patches.reshape(-1, height // patch, width // patch, patch, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(-1, height, width, channels)


class PatchEmbed(nn.Module):
    """Equation (1): `[B, S, S, C]` to tokens `[B, (S/p)^2, D]`; `base` is the grid's side that the positions are made for."""

    width: int
    patch: int
    base: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        tokens = of_patches(self.width, self.dtype)(to_patches(x, self.patch))
        positions = jnp.asarray(_positions(self.width, x.shape[1] // self.patch, self.base), self.dtype)
        return tokens + jnp.broadcast_to(positions, tokens.shape)


class Block(nn.Module):
    """Equation (2): tokens `[B, N, D]`, t and labels `[B]` to tokens and c `[B, D]`."""

    heads: int
    num_labels: int
    bias: bool
    eps: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, h: Array, t: Array, label: Array) -> tuple[Array, Array]:
        modulation, c = Modulation(self.num_labels, self.dtype, name="norm1")(h.shape[-1], t, label)
        b_1, s_1, g_1, b_2, s_2, g_2 = jnp.split(modulation, 6, axis=-1)
        attention = Attention(self.heads, h.shape[-1] // self.heads, bias=self.bias, dtype=self.dtype, name="attn1")
        h = h + g_1[:, None] * attention(modulated(h, b_1, s_1, 1e-6))
        return h + g_2[:, None] * FeedForward(self.dtype, GELU, name="ff")(modulated(h, b_2, s_2, self.eps)), c


class Modulation(nn.Module):
    """W_c silu(c) and c of equation (2), `[B, 6 D]` and `[B, D]`, for a width D."""

    num_labels: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, width: int, t: Array, label: Array) -> tuple[Array, Array]:
        c = Embedding(self.num_labels, width, self.dtype, name="emb")(t, label)
        return nn.Dense(6 * width, dtype=self.dtype, name="linear", **_ZEROS)(silu(c)), c


class Embedding(nn.Module):
    """c of equation (2): t `[B]` and labels int32 `[B]` to `[B, width]`."""

    num_labels: int
    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, t: Array, label: Array) -> Array:
        frequencies = timestep_embedding(t, TIME_WIDTH, freq_shift=1).astype(self.dtype)
        time = TimestepEmbedding(self.width, dtype=self.dtype, name="timestep_embedder")(frequencies)
        return time + ClassEmbedding(self.num_labels, self.width, self.dtype, name="class_embedder")(label)


class ClassEmbedding(nn.Module):
    """A row for each label and one for the null label."""

    num_labels: int
    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, label: Array) -> Array:
        init = nn.initializers.normal(0.02)
        return nn.Embed(self.num_labels + 1, self.width, dtype=self.dtype, embedding_init=init, name="embedding_table")(label)


class GELU(nn.Module):
    """gelu(W_1 h), four times wider."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, h: Array) -> Array:
        return jax.nn.gelu(nn.Dense(4 * h.shape[-1], dtype=self.dtype, name="proj")(h), approximate=True)


def modulated(h: Array, shift: Array, scale: Array, eps: float) -> Array:
    """Returns (1 + scale) norm(h) + shift for `h` `[B, N, D]`, scale and shift `[B, D]`; statistics are float32."""
    x = h.astype(jnp.float32)
    centered = x - x.mean(axis=-1, keepdims=True)
    x = centered * jax.lax.rsqrt(jnp.square(centered).mean(axis=-1, keepdims=True) + eps)
    return x.astype(h.dtype) * (1 + scale[:, None]) + shift[:, None]


@functools.lru_cache(maxsize=8)
def _positions(width: int, grid: int, base: int) -> np.ndarray:
    """Equation (4) for a square grid, float32 `[1, grid^2, width]`; coordinates run from 0 to `base`, whatever the grid."""
    place = (np.arange(grid, dtype=np.float32) / np.float32(grid / base)).astype(np.float64)
    angles = place[:, None] * (1 / 10000 ** (np.arange(width // 4) / (width / 4)))[None]
    one_axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    column, row = np.tile(one_axis, (grid, 1)), np.repeat(one_axis, grid, axis=0)
    return np.concatenate([column, row], axis=1).astype(np.float32)[None]
