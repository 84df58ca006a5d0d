"""UNet2D: diffusers' `UNet2DModel` in Flax, with the same names of fields and submodules, for images `[B, H, W, C]`."""

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from retrack_jax.checks import check, check_choice
from retrack_jax.models.attention import GroupNorm
from retrack_jax.models.blocks import DownBlock2D, ResnetOptions, UNetMidBlock2D, UpBlock2D
from retrack_jax.models.config_format import ConfigFormat, check_block_types
from retrack_jax.models.conv import Conv
from retrack_jax.models.embeddings import GaussianFourierProjection, TimestepEmbedding, activation, silu, timestep_embedding
from retrack_jax.notation import Array

# Block type -> (attention, resampler); a resampler of None means the config's downsample_type or upsample_type.
_DOWN_BLOCKS = {
    "DownBlock2D": (False, "conv"),
    "AttnDownBlock2D": (True, None),
    "ResnetDownsampleBlock2D": (False, "resnet"),
}
_UP_BLOCKS = {
    "UpBlock2D": (False, "conv"),
    "AttnUpBlock2D": (True, None),
    "ResnetUpsampleBlock2D": (False, "resnet"),
}
# diffusers' EMAModel writes these into the config of an averaged model; they describe the averaging, not the network.
_EMA_KEYS = ("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup")
_FORMAT = ConfigFormat(
    class_name="UNet2DModel", fixed={"class_embed_type": None, "num_class_embeds": None}, passed_over=_EMA_KEYS
)


class UNet2D(nn.Module):
    """The unconditional UNet of DDPM.

    Attributes:
      dtype: the dtype of the computation; parameters, norm statistics, softmax and the result are float32.
      remat: whether the backward pass computes the activations of residual and attention blocks again, to save memory.
      All others are those of diffusers' `UNet2DModel`, with its defaults; `attention_head_dim` is channels per head.

    New parameters are drawn as Flax does: kernels from lecun_normal (variance 1/fan_in), biases 0, norm scales 1.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    num_train_timesteps: int | None = None
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **own_fields) -> "UNet2D":
        """Returns the module for diffusers' `config.json` as a dict; `own_fields` sets `dtype` and `remat`.

        Keys that start with an underscore and those of an averaged model (EMA) are ignored. Absent keys take the defaults, which
        every version of diffusers shares, with one exception: before 0.17, the middle attention of a `scale_shift` network had a
        group norm, and there was no option for it.

        Raises:
          UserError: the config is another class's, or has an unknown key, or an option that is not supported.
        """
        values = _FORMAT.read(cls, config)
        if values.get("resnet_time_scale_shift") == "scale_shift" and _before_0_17(config):
            values.setdefault("attn_norm_num_groups", values.get("norm_num_groups", cls.norm_num_groups))
        module = cls(**values, **own_fields)
        module.check_options()
        return module

    def to_config(self) -> dict[str, Any]:
        """Returns diffusers' `config.json` of this network, every option spelled out."""
        return _FORMAT.write(self)

    def check_options(self) -> None:
        """Raises `UserError`, naming the field, for options that are not supported or do not fit together."""
        check_choice("time_embedding_type", self.time_embedding_type, ("positional", "fourier", "learned"))
        learned = self.time_embedding_type == "learned"
        check(not learned or self.num_train_timesteps, "time_embedding_type 'learned' needs num_train_timesteps")
        check(
            self.mid_block_type in ("UNetMidBlock2D", None),
            f"mid_block_type is {self.mid_block_type!r}; choose UNetMidBlock2D or null",
        )
        check_choice("downsample_type", self.downsample_type, ("conv", "resnet"))
        check_choice("upsample_type", self.upsample_type, ("conv", "resnet"))
        check_choice("resnet_time_scale_shift", self.resnet_time_scale_shift, ("default", "scale_shift"))
        activation(self.act_fn)
        check_block_types(self, plain=_plain, down_block_types=_DOWN_BLOCKS, up_block_types=_UP_BLOCKS)
        groups, widths = self.norm_num_groups, self.block_out_channels
        check(
            isinstance(groups, int) and groups > 0 and all(channels % groups == 0 for channels in widths),
            f"norm_num_groups is {groups!r}; it must divide each of block_out_channels {widths}",
        )
        attending = [c for c, kind in zip(widths, self.down_block_types, strict=True) if _DOWN_BLOCKS[_plain(kind)][0]]
        attending += [c for c, kind in zip(reversed(widths), self.up_block_types, strict=True) if _UP_BLOCKS[_plain(kind)][0]]
        attending += [widths[-1]] if self.add_attention and self.mid_block_type else []
        head_dim = self.attention_head_dim
        check(
            head_dim is None or all(0 < head_dim <= channels for channels in attending),
            f"attention_head_dim is {head_dim!r}; it counts channels per head, and one attention has {min(attending, default=0)}",
        )
        groups = self.attn_norm_num_groups
        check(
            groups is None or self.block_out_channels[-1] % groups == 0,
            f"attn_norm_num_groups is {groups!r}; it must divide the last of block_out_channels {self.block_out_channels}",
        )

    @nn.compact
    def __call__(self, x_t: Array, t: Array, deterministic: bool = True) -> Array:
        """Returns the prediction for noisy images, float32 `[B, H, W, out_channels]`.

        Args:
          x_t: `[B, H, W, in_channels]`; H and W are multiples of 2^(blocks - 1).
          t: timesteps `[B]`, int or float.
          deterministic: False turns dropout on, which draws from the rng collection "dropout".

        Raises:
          UserError: the options or the shapes do not fit (at tracing).
        """
        self.check_options()
        self._check_shapes(x_t, t)
        options = ResnetOptions.of(self)
        channels, head_dim, last = self.block_out_channels, self.attention_head_dim, len(self.block_out_channels) - 1
        temb = self._time_embedding(t)
        x = 2.0 * x_t - 1.0 if self.center_input_sample else x_t
        x = Conv(channels[0], 3, padding=1, dtype=self.dtype, name="conv_in")(x)

        skips = [x]
        for i, kind in enumerate(self.down_block_types):
            attention, resampler = _DOWN_BLOCKS[_plain(kind)]
            resampler = (resampler or self.downsample_type) if i < last else None
            fields = (options, attention, head_dim, resampler, self.downsample_padding)
            x, more = DownBlock2D(channels[i], self.layers_per_block, *fields, name=f"down_blocks_{i}")(x, temb, deterministic)
            skips += more
        if self.mid_block_type is not None:
            fields = (options, self.add_attention, head_dim, self.attn_norm_num_groups, float(self.mid_block_scale_factor))
            x = UNetMidBlock2D(*fields, name="mid_block")(x, temb, deterministic)
        layers = self.layers_per_block + 1
        for i, kind in enumerate(self.up_block_types):
            attention, resampler = _UP_BLOCKS[_plain(kind)]
            resampler = (resampler or self.upsample_type) if i < last else None
            block = UpBlock2D(channels[last - i], layers, options, attention, head_dim, resampler, name=f"up_blocks_{i}")
            x = block(x, skips[-layers:], temb, deterministic)
            skips = skips[:-layers]

        # The last activation is SiLU whatever act_fn is, as in diffusers.
        x = silu(GroupNorm(self.norm_num_groups, self.norm_eps, self.dtype, name="conv_norm_out")(x))
        x = Conv(self.out_channels, 3, padding=1, dtype=self.dtype, name="conv_out")(x).astype(jnp.float32)
        if self.time_embedding_type == "fourier":
            x = x / t.astype(jnp.float32)[:, None, None, None]
        return x

    def _time_embedding(self, t: Array) -> Array:
        dim = self.block_out_channels[0]
        if self.time_embedding_type == "fourier":
            t_emb = GaussianFourierProjection(dim, name="time_proj")(t)
        elif self.time_embedding_type == "learned":
            t_emb = nn.Embed(self.num_train_timesteps, dim, name="time_proj")(t)
        else:
            t_emb = timestep_embedding(t, dim, flip_sin_to_cos=self.flip_sin_to_cos, freq_shift=self.freq_shift)
        return TimestepEmbedding(self.time_embedding_dim or 4 * dim, dtype=self.dtype, name="time_embedding")(t_emb)

    def _check_shapes(self, x_t: Array, t: Array) -> None:
        check(
            x_t.ndim == 4 and x_t.shape[-1] == self.in_channels,
            f"x_t has shape {x_t.shape}; UNet2D needs [B, H, W, {self.in_channels}]",
        )
        height, width, multiple = *x_t.shape[1:3], 2 ** (len(self.block_out_channels) - 1)
        check(
            height % multiple == 0 and width % multiple == 0,
            f"images are {height} x {width}; with {len(self.block_out_channels)} blocks both must be multiples of {multiple}",
        )
        check(t.shape == x_t.shape[:1], f"t has shape {t.shape}; it needs one timestep for each of {x_t.shape[0]} images")


def _plain(block_type: str) -> str:
    """Removes the prefix `UNetRes` that block types have in some early configs."""
    return str(block_type).removeprefix("UNetRes")


def _before_0_17(config: Mapping[str, Any]) -> bool:
    version = re.match(r"(\d+)\.(\d+)", str(config.get("_diffusers_version", "")))
    return version is not None and tuple(map(int, version.groups())) < (0, 17)
