"""T5's encoder in its version 1.1, the third text encoder of Stable Diffusion 3.

Layers and parameters have the names of transformers' `T5EncoderModel`. Attention has no scale and no positions but a bias of each
head by the distance of two tokens, which the first layer holds for all. Padding is not masked: Stable Diffusion 3 attends to it.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax.checks import check, check_int, check_number
from retrack_jax.models.config_format import LARGEST, MOST_LAYERS
from retrack_jax.models.layer_norm import RMSNorm
from retrack_jax.notation import Array, PyTree

_WHERE = "text_encoder_3 config"
_COUNTS = (
    "vocab_size d_model d_kv d_ff num_layers num_heads relative_attention_num_buckets relative_attention_max_distance"
).split()


def distance_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Returns int32 `[length, length]`: the bucket of the distance j - i from token i to token j.

    Half of the buckets are for j > i. Of each half, half hold one distance d each, and the others grow with log(d) up to
    `max_distance`; what is farther shares the last.
    """
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half, exact = num_buckets // 2, num_buckets // 4
    far = np.maximum(np.abs(distance), exact).astype(np.float32)
    steps = np.log(far / np.float32(exact)) / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    bucket = np.where(np.abs(distance) < exact, np.abs(distance), np.minimum(exact + steps.astype(np.int32), half - 1))
    return (bucket + half * (distance > 0)).astype(np.int32)


@dataclass(frozen=True, kw_only=True)
class T5Sizes:
    """Fields and defaults of transformers' `T5Config`, and the dtype of the activations; parameters keep theirs."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    dtype: Any = jnp.float32

    def __post_init__(self):
        for name in _COUNTS:
            check_int(f"{_WHERE}: {name}", getattr(self, name), 1, MOST_LAYERS if name == "num_layers" else LARGEST)
        buckets, farthest = self.relative_attention_num_buckets, self.relative_attention_max_distance
        check(
            buckets >= 4 and farthest > buckets // 4,
            f"{_WHERE}: {buckets} buckets of distances up to {farthest}; there must be 4 or more, and greater distances",
        )
        check_number(f"{_WHERE}: layer_norm_epsilon", self.layer_norm_epsilon, 0.0, 1.0)


class T5Encoder(nn.Module):
    """Token ids `[B, N]` int32 to hidden states `[B, N, d_model]`."""

    sizes: T5Sizes

    @classmethod
    def from_config(cls, config: dict, dtype=jnp.float32) -> "T5Encoder":
        """Returns the encoder of a `text_encoder_3/config.json`. Raises `UserError` that names what is not supported."""
        kind, layer = config.get("model_type", "t5"), config.get("feed_forward_proj", "relu")
        check(kind == "t5", f"{_WHERE}: model_type is {kind!r}; only t5 is supported")
        check(layer == "gated-gelu", f"{_WHERE}: feed_forward_proj is {layer!r}; only gated-gelu, T5's version 1.1, is supported")
        return cls(T5Sizes(**{name: config[name] for name in (*_COUNTS, "layer_norm_epsilon") if name in config}, dtype=dtype))

    @nn.compact
    def __call__(self, ids_BN: Array) -> Array:
        return _Stack(self.sizes, name="encoder")(_embed(self.sizes, name="shared")(ids_BN))


def states_by_layers(encoder: T5Encoder, params: PyTree, ids_BN: Array) -> Array:
    """Returns what `encoder.apply` does, by one program after the other, each of one layer and its parameters.

    XXL in float16 is 9.5 GB, and on a CPU one program of all layers would hold it twice more in float32.
    """
    sizes, layers = encoder.sizes, params["encoder"]
    x_BND, bias = _applied(_embed(sizes), params["shared"], ids_BN), None
    for index in range(sizes.num_layers):
        x_BND, bias = _applied(_Block(sizes), layers[f"block_{index}"], x_BND, bias)
    return _applied(_norm(sizes), layers["final_layer_norm"], x_BND)


@partial(jax.jit, static_argnums=0)
def _applied(module: nn.Module, params: PyTree, *inputs: Array) -> PyTree:
    return module.apply({"params": params}, *inputs)


class _Stack(nn.Module):
    """The layers and the norm after them; `sizes` are the encoder's."""

    sizes: T5Sizes

    @nn.compact
    def __call__(self, x_BND: Array) -> Array:
        bias = None
        for index in range(self.sizes.num_layers):
            x_BND, bias = _Block(self.sizes, name=f"block_{index}")(x_BND, bias)
        return _norm(self.sizes, name="final_layer_norm")(x_BND)


class _Block(nn.Module):
    """Attention and a gated feed-forward layer, each after a norm."""

    sizes: T5Sizes

    @nn.compact
    def __call__(self, x_BND: Array, bias: Array | None) -> tuple[Array, Array]:
        x_BND, bias = _AttentionLayer(self.sizes, name="layer_0")(x_BND, bias)
        return _FeedForwardLayer(self.sizes, name="layer_1")(x_BND), bias


class _AttentionLayer(nn.Module):
    sizes: T5Sizes

    @nn.compact
    def __call__(self, x_BND: Array, bias: Array | None) -> tuple[Array, Array]:
        mixed, bias = _Attention(self.sizes, name="SelfAttention")(_norm(self.sizes, name="layer_norm")(x_BND), bias)
        return x_BND + mixed, bias


class _FeedForwardLayer(nn.Module):
    sizes: T5Sizes

    @nn.compact
    def __call__(self, x_BND: Array) -> Array:
        return x_BND + _GatedGelu(self.sizes, name="DenseReluDense")(_norm(self.sizes, name="layer_norm")(x_BND))


class _Attention(nn.Module):
    """Attention with the bias `[1, H, N, N]`, made here if none is given; the softmax is taken in float32."""

    sizes: T5Sizes

    @nn.compact
    def __call__(self, x_BND: Array, bias: Array | None) -> tuple[Array, Array]:
        sizes, (batch, length, _) = self.sizes, x_BND.shape
        heads = (batch, length, sizes.num_heads, sizes.d_kv)
        q, k, v = (_dense(sizes, sizes.num_heads * sizes.d_kv, name)(x_BND).reshape(heads) for name in "qkv")
        if bias is None:
            count, farthest = sizes.relative_attention_num_buckets, sizes.relative_attention_max_distance
            embed = nn.Embed(count, sizes.num_heads, name="relative_attention_bias", dtype=jnp.float32)
            bias = embed(distance_buckets(length, count, farthest)).transpose(2, 0, 1)[None]
        logits_BHNM = jnp.einsum("bnhd,bmhd->bhnm", q, k).astype(jnp.float32) + bias
        mixed = jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(logits_BHNM, axis=-1).astype(sizes.dtype), v)
        return _dense(sizes, sizes.d_model, "o")(mixed.reshape(batch, length, -1)), bias


class _GatedGelu(nn.Module):
    sizes: T5Sizes

    @nn.compact
    def __call__(self, x: Array) -> Array:
        gate = jax.nn.gelu(_dense(self.sizes, self.sizes.d_ff, "wi_0")(x), approximate=True)
        return _dense(self.sizes, self.sizes.d_model, "wo")(gate * _dense(self.sizes, self.sizes.d_ff, "wi_1")(x))


def _dense(sizes: T5Sizes, features: int, name: str) -> nn.Dense:
    return nn.Dense(features, use_bias=False, dtype=sizes.dtype, name=name)


def _embed(sizes: T5Sizes, **name) -> nn.Embed:
    return nn.Embed(sizes.vocab_size, sizes.d_model, dtype=sizes.dtype, **name)


def _norm(sizes: T5Sizes, **name) -> RMSNorm:
    return RMSNorm(sizes.layer_norm_epsilon, sizes.dtype, **name)
