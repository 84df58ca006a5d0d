"""UNet2DCondition: diffusers' `UNet2DConditionModel` in Flax, for Stable Diffusion 1.x and 2.x.

It shares its layers with `UNet2D` and adds blocks with cross-attention to a prompt. In these configs `attention_head_dim` is the
*number* of heads: an old mistake of diffusers, on which checkpoints now depend.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from retrack_jax.checks import UserError, check, check_choice, check_int
from retrack_jax.models.attention import GroupNorm
from retrack_jax.models.blocks import DownBlock2D, ResnetOptions, UpBlock2D
from retrack_jax.models.config_format import ConfigFormat, check_block_types
from retrack_jax.models.conv import Conv
from retrack_jax.models.embeddings import TimestepEmbedding, activation, timestep_embedding
from retrack_jax.models.resnet import Downsample2D, Upsample2D
from retrack_jax.models.transformer2d import Transformer2DModel
from retrack_jax.notation import Array

# Options of UNet2DConditionModel that are supported at one value only, which every Stable Diffusion 1.x and 2.x checkpoint has.
_FIXED = {
    "addition_embed_type": None, "addition_time_embed_dim": None, "attention_type": "default", "class_embed_type": None,
    "class_embeddings_concat": False, "conv_in_kernel": 3, "conv_out_kernel": 3, "cross_attention_norm": None,
    "dual_cross_attention": False, "encoder_hid_dim": None, "encoder_hid_dim_type": None, "mid_block_only_cross_attention": None,
    "num_attention_heads": None, "num_class_embeds": None, "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None, "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": False,
    "reverse_transformer_layers_per_block": None, "time_cond_proj_dim": None, "time_embedding_act_fn": None,
    "time_embedding_type": "positional", "timestep_post_act": None,
}  # fmt: skip
# Ignored: they matter only with an option above, or ask for a precision that is always used here (logits in float32).
_PASSED_OVER = ("addition_embed_type_num_heads", "upcast_attention", "attention_upcast")
_FORMAT = ConfigFormat(class_name="UNet2DConditionModel", fixed=_FIXED, passed_over=_PASSED_OVER)
_DOWN_BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP_BLOCKS = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerOptions:
    """What the transformers of one block have in common; see `Transformer2DModel`."""

    heads: int
    num_layers: int
    use_linear_projection: bool

    def transformer(self, options: ResnetOptions, name: str) -> Transformer2DModel:
        """Returns a transformer with these options and the block's norms, dtype and remat."""
        fields = (self.heads, self.num_layers, options.groups, self.use_linear_projection, options.dtype, options.remat)
        return Transformer2DModel(*fields, name=name)


class CrossAttnDownBlock2D(nn.Module):
    """`num_layers` residual blocks, each with a transformer, then a strided convolution if `resampler`."""

    out_channels: int
    num_layers: int
    options: ResnetOptions
    attention: TransformerOptions
    resampler: bool
    downsample_padding: int = 1

    @nn.compact
    def __call__(self, x: Array, temb: Array, prompt: Array, deterministic: bool) -> tuple[Array, list[Array]]:
        skips = []
        for i in range(self.num_layers):
            x = self.options.resnet(self.out_channels, f"resnets_{i}")(x, temb, deterministic)
            skips.append(x := self.attention.transformer(self.options, f"attentions_{i}")(x, prompt))
        if self.resampler:
            down = Downsample2D(self.out_channels, self.downsample_padding, self.options.dtype, name="downsamplers_0")
            skips.append(x := down(x))
        return x, skips


class UNetMidBlock2DCrossAttn(nn.Module):
    """Two residual blocks with a transformer between them."""

    options: ResnetOptions
    attention: TransformerOptions
    output_scale_factor: float = 1.0

    @nn.compact
    def __call__(self, x: Array, temb: Array, prompt: Array, deterministic: bool) -> Array:
        channels, scale = x.shape[-1], self.output_scale_factor
        x = self.options.resnet(channels, "resnets_0", output_scale_factor=scale)(x, temb, deterministic)
        x = self.attention.transformer(self.options, "attentions_0")(x, prompt)
        return self.options.resnet(channels, "resnets_1", output_scale_factor=scale)(x, temb, deterministic)


class CrossAttnUpBlock2D(nn.Module):
    """The mirror of `CrossAttnDownBlock2D`: each residual block also reads one of `skips`, last first."""

    out_channels: int
    num_layers: int
    options: ResnetOptions
    attention: TransformerOptions
    resampler: bool

    @nn.compact
    def __call__(self, x: Array, skips: list[Array], temb: Array, prompt: Array, deterministic: bool) -> Array:
        for i, skip in enumerate(reversed(skips)):
            x = jnp.concatenate([x, skip], axis=-1)
            x = self.options.resnet(self.out_channels, f"resnets_{i}")(x, temb, deterministic)
            x = self.attention.transformer(self.options, f"attentions_{i}")(x, prompt)
        return Upsample2D(self.out_channels, self.options.dtype, name="upsamplers_0")(x) if self.resampler else x


class UNet2DCondition(nn.Module):
    """The UNet of Stable Diffusion 1.x and 2.x; fields and defaults are those of diffusers' `UNet2DConditionModel`.

    Attributes:
      attention_head_dim: number of heads, one for all blocks or one for each.
      cross_attention_dim: features of the prompt's tokens.
      dtype: the dtype of the computation; norm statistics, softmax and the result are float32.
      remat: whether the backward pass computes the activations of residual and transformer blocks again.
    """

    sample_size: Any = None
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1
    dropout: float = 0.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    resnet_time_scale_shift: str = "default"
    time_embedding_dim: int | None = None
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **own_fields) -> "UNet2DCondition":
        """Returns the module for diffusers' `unet/config.json` as a dict; `own_fields` sets `dtype` and `remat`.

        Raises:
          UserError: the config is another class's or SDXL's, or has an unknown key, or an option that is not supported.
        """
        if config.get("addition_embed_type") == "text_time":
            raise UserError(
                "the config is of Stable Diffusion XL, which is not supported; give a Stable Diffusion 1.x or 2.x folder"
            )
        module = cls(**_FORMAT.read(cls, config), **own_fields)
        module.check_options()
        return module

    def to_config(self) -> dict[str, Any]:
        """Returns diffusers' `config.json` of this network, every option spelled out."""
        return _FORMAT.write(self)

    def check_options(self) -> None:
        """Raises `UserError`, naming the field, for options that are not supported or do not fit together."""
        channels = self.block_out_channels
        check_block_types(self, down_block_types=_DOWN_BLOCKS, up_block_types=_UP_BLOCKS)
        check_choice("mid_block_type", str(self.mid_block_type), ("UNetMidBlock2DCrossAttn", "None"))
        check_choice("resnet_time_scale_shift", self.resnet_time_scale_shift, ("default", "scale_shift"))
        check_int("layers_per_block", self.layers_per_block)
        check_int("cross_attention_dim", self.cross_attention_dim)
        activation(self.act_fn)
        for width, heads in zip(channels, self._per_block("attention_head_dim"), strict=True):
            check(
                width % self.norm_num_groups == 0,
                f"norm_num_groups is {self.norm_num_groups}; it must divide {width} channels",
            )
            fits = isinstance(heads, int) and heads > 0 and width % heads == 0
            check(fits, f"attention_head_dim is {heads!r}; it is the number of heads here and must divide {width} channels")
        for layers in self._per_block("transformer_layers_per_block"):
            check_int("transformer_layers_per_block", layers)

    @nn.compact
    def __call__(self, x_t: Array, t: Array, encoder_hidden_states: Array, deterministic: bool = True) -> Array:
        """Returns the prediction for noisy latents, float32 `[B, H, W, out_channels]`.

        Args:
          x_t: `[B, H, W, in_channels]`; H and W are multiples of 2^(blocks - 1).
          t: timesteps `[B]`, int or float.
          encoder_hidden_states: prompt embeddings `[B, M, cross_attention_dim]`, or `[1, M, cross_attention_dim]` for all images.
          deterministic: False turns dropout on, which draws from the rng collection "dropout".

        Raises:
          UserError: the options or the shapes do not fit (at tracing).
        """
        self.check_options()
        self._check_shapes(x_t, t, encoder_hidden_states)
        options = ResnetOptions.of(self)
        prompt = jnp.broadcast_to(encoder_hidden_states, (x_t.shape[0], *encoder_hidden_states.shape[1:])).astype(self.dtype)
        attention = [
            TransformerOptions(heads=heads, num_layers=layers, use_linear_projection=self.use_linear_projection)
            for heads, layers in zip(
                self._per_block("attention_head_dim"), self._per_block("transformer_layers_per_block"), strict=True
            )
        ]
        channels, last, depth = self.block_out_channels, len(self.block_out_channels) - 1, self.layers_per_block
        temb = self._time_embedding(t)
        x = 2.0 * x_t - 1.0 if self.center_input_sample else x_t
        x = Conv(channels[0], 3, padding=1, dtype=self.dtype, name="conv_in")(x)

        skips = [x]
        for i, kind in enumerate(self.down_block_types):
            name, padding = f"down_blocks_{i}", self.downsample_padding
            if _DOWN_BLOCKS[kind]:
                block = CrossAttnDownBlock2D(channels[i], depth, options, attention[i], i < last, padding, name=name)
                x, more = block(x, temb, prompt, deterministic)
            else:
                block = DownBlock2D(
                    channels[i],
                    depth,
                    options,
                    resampler="conv" if i < last else None,
                    downsample_padding=padding,
                    name=name,
                )
                x, more = block(x, temb, deterministic)
            skips += more
        if self.mid_block_type is not None:
            mid = UNetMidBlock2DCrossAttn(options, attention[-1], float(self.mid_block_scale_factor), name="mid_block")
            x = mid(x, temb, prompt, deterministic)
        for i, kind in enumerate(self.up_block_types):
            name, width, here = f"up_blocks_{i}", channels[last - i], skips[-depth - 1 :]
            if _UP_BLOCKS[kind]:
                block = CrossAttnUpBlock2D(width, depth + 1, options, attention[last - i], i < last, name=name)
                x = block(x, here, temb, prompt, deterministic)
            else:
                block = UpBlock2D(width, depth + 1, options, resampler="conv" if i < last else None, name=name)
                x = block(x, here, temb, deterministic)
            skips = skips[: -depth - 1]

        x = activation(self.act_fn)(GroupNorm(self.norm_num_groups, self.norm_eps, self.dtype, name="conv_norm_out")(x))
        return Conv(self.out_channels, 3, padding=1, dtype=self.dtype, name="conv_out")(x).astype(jnp.float32)

    def _per_block(self, field: str) -> tuple:
        """Returns the values of an option for all blocks; the field holds one for all, or one for each."""
        value, blocks = getattr(self, field), len(self.block_out_channels)
        if not isinstance(value, (tuple, list)):
            return (value,) * blocks
        check(len(value) == blocks, f"{field} has {len(value)} entries, block_out_channels {blocks}; they must be as many")
        return tuple(value)

    def _time_embedding(self, t: Array) -> Array:
        width = self.block_out_channels[0]
        t_emb = timestep_embedding(t, width, flip_sin_to_cos=self.flip_sin_to_cos, freq_shift=self.freq_shift)
        embed = TimestepEmbedding(self.time_embedding_dim or 4 * width, self.act_fn, self.dtype, name="time_embedding")
        return embed(t_emb)

    def _check_shapes(self, x_t: Array, t: Array, prompt: Array) -> None:
        fits = x_t.ndim == 4 and x_t.shape[-1] == self.in_channels
        check(fits, f"x_t has shape {x_t.shape}; UNet2DCondition needs [B, H, W, {self.in_channels}]")
        multiple = 2 ** (len(self.block_out_channels) - 1)
        fits = x_t.shape[1] % multiple == 0 and x_t.shape[2] % multiple == 0
        check(
            fits,
            f"latents are {x_t.shape[1]} x {x_t.shape[2]}; with {len(self.block_out_channels)} blocks both must be multiples of "
            f"{multiple}",
        )
        check(t.shape == x_t.shape[:1], f"t has shape {t.shape}; it needs one timestep for each of {x_t.shape[0]} latents")
        fits = prompt.ndim == 3 and prompt.shape[0] in (1, x_t.shape[0]) and prompt.shape[2] == self.cross_attention_dim
        check(
            fits,
            f"encoder_hidden_states has shape {prompt.shape}; it needs [{x_t.shape[0]} or 1, tokens, "
            f"{self.cross_attention_dim}]: take UNet and text encoder from one checkpoint",
        )
