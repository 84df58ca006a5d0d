"""CLIP's text transformer: the text encoders of Stable Diffusion 1.x, 2.x and XL, and the text tower of CLIP itself.

Layers and parameters have the names of transformers' `CLIPTextModel`; the reader of OpenAI's own CLIP files renames weights to
these. Padding is not masked: the causal mask hides it from every earlier token, and Stable Diffusion attends to it on purpose.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from retrack_jax.checks import check, check_choice, check_int, check_number
from retrack_jax.models.config_format import LARGEST, MOST_LAYERS
from retrack_jax.models.layer_norm import LayerNorm
from retrack_jax.notation import Array

# All keys that decide what the encoder computes; dozens of others that transformers writes concern generation and training.
_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings "
    "hidden_act layer_norm_eps"
).split()


_ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # OpenAI CLIP's approximation of GELU
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


class ClipAttention(nn.Module):
    """Causal self-attention over tokens `[B, N, D]`; the softmax is taken in float32."""

    num_heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BND: Array) -> Array:
        batch, length, width = x_BND.shape
        heads = (batch, length, self.num_heads, width // self.num_heads)
        q, k, v = (nn.Dense(width, dtype=self.dtype, name=f"{name}_proj")(x_BND).reshape(heads) for name in "qkv")
        logits_BHNM = jnp.einsum("bnhd,bmhd->bhnm", q, k).astype(jnp.float32) * (width // self.num_heads) ** -0.5
        causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
        logits_BHNM = jnp.where(causal, logits_BHNM, jnp.finfo(jnp.float32).min)
        mixed = jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(logits_BHNM, axis=-1).astype(self.dtype), v)
        return nn.Dense(width, dtype=self.dtype, name="out_proj")(mixed.reshape(x_BND.shape))


class ClipMlp(nn.Module):
    """Two dense layers around an activation."""

    features: int
    activation: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        hidden = _ACTIVATIONS[self.activation](nn.Dense(self.features, dtype=self.dtype, name="fc1")(x))
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(hidden)


class ClipLayer(nn.Module):
    """A pre-norm transformer layer; the names of its fields are those of transformers' `CLIPTextConfig`."""

    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    layer_norm_eps: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        attention = ClipAttention(self.num_attention_heads, self.dtype, name="self_attn")
        mlp = ClipMlp(self.intermediate_size, self.hidden_act, self.dtype, name="mlp")
        x = x + attention(LayerNorm(self.layer_norm_eps, self.dtype, name="layer_norm1")(x))
        return x + mlp(LayerNorm(self.layer_norm_eps, self.dtype, name="layer_norm2")(x))


class ClipTextEncoder(nn.Module):
    """Token ids `[B, N]` int32 to hidden states `[B, N, hidden_size]` after the final layer norm.

    Attributes:
      projection_dim: the number of features to which `pooled` projects (CLIP's joint space), or None as in Stable Diffusion 1.x.
      eos_token_id: the id of the end token, where `pooled` looks. None, or 2 as old configs have it: the highest id.
      dtype: the dtype of the activations; parameters keep theirs.
      All others, and their defaults, are those of transformers' `CLIPTextConfig`.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int | None = None
    eos_token_id: int | None = None
    dtype: Any = jnp.float32

    @classmethod
    def from_config(cls, config: dict, **overrides) -> "ClipTextEncoder":
        """Returns the encoder of a `text_encoder/config.json`. Raises `UserError` that names an option that is not supported."""
        kind = config.get("model_type", "clip_text_model")
        check(kind == "clip_text_model", f"text encoder config: model_type is {kind!r}; only clip_text_model is supported")
        masked = config.get("use_attention_mask", False)
        check(not masked, "text encoder config: use_attention_mask is true; only encoders that attend to padding are supported")
        fields = {key: config[key] for key in (*_FIELDS, "eos_token_id") if key in config}
        module = cls(**{**fields, **overrides})
        check_choice("text encoder config: hidden_act", module.hidden_act, _ACTIVATIONS)
        for name in _FIELDS[:6]:
            most = MOST_LAYERS if name == "num_hidden_layers" else LARGEST
            check_int(f"text encoder config: {name}", getattr(module, name), 1, most)
        check_number("text encoder config: layer_norm_eps", module.layer_norm_eps, 0.0, 1.0)
        if module.projection_dim is not None:
            check_int("text encoder config: projection_dim", module.projection_dim, 1, LARGEST)
        if module.eos_token_id is not None:
            check_int("text encoder config: eos_token_id", module.eos_token_id, 0)
        size, heads = module.hidden_size, module.num_attention_heads
        check(size % heads == 0, f"text encoder config: hidden_size {size} does not split into {heads} heads")
        return module

    def setup(self):
        self.embeddings = ClipEmbeddings(self.vocab_size, self.max_position_embeddings, self.hidden_size, self.dtype)
        layer = (self.num_attention_heads, self.intermediate_size, self.hidden_act, self.layer_norm_eps, self.dtype)
        self.encoder = ClipLayers(self.num_hidden_layers, layer)
        self.final_layer_norm = LayerNorm(self.layer_norm_eps, self.dtype)
        if self.projection_dim is not None:
            self.text_projection = nn.Dense(self.projection_dim, use_bias=False, dtype=self.dtype)

    def __call__(self, ids_BN: Array) -> Array:
        return self._states(ids_BN)[1]

    def pooled(self, ids_BN: Array) -> Array:
        """Returns the features `[B, projection_dim]` at the first end token."""
        return self.penultimate_and_pooled(ids_BN)[1]

    def penultimate_and_pooled(self, ids_BN: Array) -> tuple[Array, Array]:
        """Returns the states that the last layer reads, `[B, N, hidden_size]`, without the final norm, and those of `pooled`."""
        before_BND, hidden_BND = self._states(ids_BN)
        ends_BN = ids_BN if self.eos_token_id in (None, 2) else (ids_BN == self.eos_token_id).astype(jnp.int32)
        end_BD = jnp.take_along_axis(hidden_BND, jnp.argmax(ends_BN, axis=1)[:, None, None], axis=1)[:, 0]
        return before_BND, end_BD if self.projection_dim is None else self.text_projection(end_BD)

    def _states(self, ids_BN: Array) -> tuple[Array, Array]:
        """Returns the states before the last layer, and those after the final layer norm."""
        before_BND, hidden_BND = self.encoder(self.embeddings(ids_BN))
        hidden_BND = self.final_layer_norm(hidden_BND)
        if self.projection_dim is not None and self.is_initializing():
            self.text_projection(hidden_BND)
        return before_BND, hidden_BND


class ClipEmbeddings(nn.Module):
    """Token embeddings plus learned positions."""

    vocab_size: int
    max_position_embeddings: int
    hidden_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids_BN: Array) -> Array:
        if ids_BN.shape[1] > self.max_position_embeddings:
            raise ValueError(f"{ids_BN.shape[1]} tokens, but the text encoder has {self.max_position_embeddings} positions")
        options = {"features": self.hidden_size, "dtype": self.dtype, "embedding_init": nn.initializers.normal(0.02)}
        tokens_BND = nn.Embed(self.vocab_size, **options, name="token_embedding")(ids_BN)
        positions = nn.Embed(self.max_position_embeddings, **options, name="position_embedding")
        return tokens_BND + positions(jnp.arange(ids_BN.shape[1]))[None]


class ClipLayers(nn.Module):
    """The stack of transformer layers, whose fields are `layer`; returns what the last one reads, and what it gives."""

    num_layers: int
    layer: tuple

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        before = x
        for index in range(self.num_layers):
            before, x = x, ClipLayer(*self.layer, name=f"layers_{index}")(x)
        return before, x
