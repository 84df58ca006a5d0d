"""CLIP's RN50 image tower in Flax, with its attention pool, and the reading of OpenAI's weights for both towers.

It differs from the usual ResNet-50: a stem of three convolutions and an average pool, strides done by average pools before
1 x 1 convolutions, and attention pooling by one query, the mean token. CLIP-IQA leaves the positional embedding of that
pool out, so that any image size is embedded without resizing; the weights hold one, and it is read and dropped by name.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax.checks import UserError
from retrack_jax.metrics.features.layers import BatchNorm, conv
from retrack_jax.models.clip_text import ClipTextEncoder
from retrack_jax.models.resnet import downsample_mean
from retrack_jax.notation import Array, PyTree
from retrack_jax.weights.names import RenameTable, from_torch, param_shapes


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, average pool, 1 x 1 to four times the width; the shortcut is pooled alike.

    Attributes:
      width: channels within.
      stride: 2, or 1 for no pooling.
    """

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        pool = downsample_mean if self.stride == 2 else lambda x: x
        h = nn.relu(BatchNorm(1e-5, name="bn1")(conv(self.width, 1, name="conv1")(x)))
        h = nn.relu(BatchNorm(1e-5, name="bn2")(conv(self.width, 3, padding=1, name="conv2")(h)))
        h = BatchNorm(1e-5, name="bn3")(conv(4 * self.width, 1, name="conv3")(pool(h)))
        if self.stride > 1 or x.shape[-1] != 4 * self.width:
            x = BatchNorm(1e-5, name="downsample_1")(conv(4 * self.width, 1, name="downsample_0")(pool(x)))
        return nn.relu(h + x)


class AttentionPool(nn.Module):
    """Attends from the mean token to the mean token and all places: `[B, H, W, C]` to `[B, features]`, without positions."""

    num_heads: int
    features: int

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        batch, width = x_BHWC.shape[0], x_BHWC.shape[-1]
        x_BND = x_BHWC.reshape(batch, -1, width)
        x_BND = jnp.concatenate([x_BND.mean(axis=1, keepdims=True), x_BND], axis=1)
        depth = width // self.num_heads
        # Only the first token's output is used, so only its query is needed.
        q_BHD = nn.Dense(width, name="q_proj")(x_BND[:, 0]).reshape(batch, self.num_heads, depth)
        k_BNHD = nn.Dense(width, name="k_proj")(x_BND).reshape(batch, -1, self.num_heads, depth)
        v_BNHD = nn.Dense(width, name="v_proj")(x_BND).reshape(batch, -1, self.num_heads, depth)
        weights_BHN = jax.nn.softmax(jnp.einsum("bhd,bnhd->bhn", q_BHD, k_BNHD) * depth**-0.5, axis=-1)
        mixed_BD = jnp.einsum("bhn,bnhd->bhd", weights_BHN, v_BNHD).reshape(batch, width)
        return nn.Dense(self.features, name="c_proj")(mixed_BD)


class ClipImageTower(nn.Module):
    """Normalized images `[B, H, W, 3]`, H and W multiples of 32, to features `[B, features]`.

    Attributes:
      layers: bottlenecks per stage.
      width: channels of the stem; the last stage has 32 times as many.
      num_heads: heads of the attention pool.
      features: size of CLIP's joint space.
    """

    layers: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    num_heads: int = 32
    features: int = 1024

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for index, (features, stride) in enumerate([(self.width // 2, 2), (self.width // 2, 1), (self.width, 1)], start=1):
            x = nn.relu(BatchNorm(1e-5, name=f"bn{index}")(conv(features, 3, stride, 1, name=f"conv{index}")(x)))
        x = downsample_mean(x)
        for stage, count in enumerate(self.layers):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Bottleneck(self.width * 2**stage, stride, name=f"layer{stage + 1}_{block}")(x)
        return AttentionPool(self.num_heads, self.features, name="attnpool")(x)


# Sizes kept as buffers; the learned scale, which CLIP-IQA replaces by 100; positions, which CLIP-IQA leaves out.
_UNUSED = ("input_resolution", "context_length", "vocab_size", "logit_scale", "visual.attnpool.positional_embedding")
_TABLE = RenameTable(
    lists=("layer1", "layer2", "layer3", "layer4", "downsample", "layers"),
    modules={
        "embeddings": "",
        "encoder": "transformer",
        "layers": "resblocks",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "self_attn": "attn",
        "fc1": "c_fc",
        "fc2": "c_proj",
        "final_layer_norm": "ln_final",
    },
    canonical=str,
    ignored=tuple(map(re.escape, _UNUSED)),
)


@dataclass(frozen=True)
class ClipTowers:
    """Both towers with their parameters."""

    image: ClipImageTower
    image_params: PyTree
    text: ClipTextEncoder
    text_params: PyTree


def towers_from_openai(weights: Mapping[str, np.ndarray]) -> ClipTowers:
    """Builds both towers from the tensors of OpenAI's `RN50.pt`, by their names in that file; sizes are read from the shapes.

    Raises:
      UserError: a tensor is missing, left over, or of a shape that does not fit, listed by name; or the file is a ViT's.
    """
    if "visual.proj" in weights:
        raise UserError("these CLIP weights are a ViT's; CLIP-IQA uses RN50 (RN50.pt)")
    try:
        vocabulary, hidden = weights["token_embedding.weight"].shape
        _, features = weights["text_projection"].shape
        width = weights["visual.conv3.weight"].shape[0]
        image = ClipImageTower(
            layers=tuple(_count(weights, f"visual.layer{stage}.") for stage in (1, 2, 3, 4)),
            width=width,
            num_heads=width * 32 // 64,
            features=features,
        )
        text = ClipTextEncoder(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=weights["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            num_hidden_layers=_count(weights, "transformer.resblocks."),
            num_attention_heads=hidden // 64,
            max_position_embeddings=weights["positional_embedding"].shape[0],
            projection_dim=features,
        )
    except KeyError as error:
        raise UserError(f"CLIP weights: no tensor {error.args[0]!r}; expected the tensors of OpenAI's RN50.pt") from error
    except (IndexError, ValueError) as error:
        raise UserError(f"CLIP weights: a tensor of another shape ({error}); expected those of OpenAI's RN50.pt") from error
    if width < 2 or width % 2 or hidden < 64 or hidden % 64:
        raise UserError(f"CLIP weights: {width} channels and {hidden} features; expected the tensors of OpenAI's RN50.pt")
    shapes = param_shapes(text, jnp.zeros((1, 1), jnp.int32)) | {"visual": param_shapes(image, jnp.zeros((1, 32, 32, 3)))}
    params = from_torch(_unpacked(weights), shapes, table=_TABLE, where="the file of CLIP weights", network="CLIP's RN50")
    return ClipTowers(image, params.pop("visual"), text, params)


def _count(weights: Mapping[str, np.ndarray], prefix: str) -> int:
    numbers = {name[len(prefix) :].split(".")[0] for name in weights if name.startswith(prefix)}
    if not numbers:
        raise KeyError(f"{prefix}0")
    return len(numbers)


def _unpacked(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors with one for each of q, k and v, which OpenAI packs, and the text tower's arrays as layers' weights."""
    tensors = {}
    for name, value in weights.items():
        stem, packed, leaf = name.partition(".in_proj_")
        if packed and value.ndim:
            tensors |= {f"{stem}.{part}_proj.{leaf}": third for part, third in zip("qkv", np.array_split(value, 3), strict=True)}
        elif name == "positional_embedding":
            tensors["position_embedding.weight"] = value
        elif name == "text_projection":  # stored for x @ projection
            tensors["text_projection.weight"] = value.T
        else:
            tensors[name] = value
    return tensors
