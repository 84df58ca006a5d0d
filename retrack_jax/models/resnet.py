"""The residual block, and the layers that change the resolution, which all UNets and the autoencoder share."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from retrack_jax.models.attention import GroupNorm
from retrack_jax.models.conv import Conv
from retrack_jax.models.embeddings import activation
from retrack_jax.notation import Array


def upsample_nearest(x: Array) -> Array:
    """Doubles height and width of `[B, H, W, C]` by repeating each pixel."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def downsample_mean(x: Array) -> Array:
    """Halves height and width of `[B, H, W, C]` by the mean of 2 x 2 pixels; an odd last row or column is dropped."""
    b, h, w, c = x.shape
    h, w = h // 2, w // 2
    return jnp.mean(x[:, : 2 * h, : 2 * w, :].reshape(b, h, 2, w, 2, c), axis=(2, 4))


class Downsample2D(nn.Module):
    """Halves the resolution by a 3 x 3 convolution of stride 2.

    `padding` is diffusers' `downsample_padding`: how many pixels of zeros on each side. But 0 means one row below and one column
    to the right.
    """

    out_channels: int
    padding: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        padding = self.padding or ((0, 1), (0, 1))
        return Conv(self.out_channels, 3, strides=2, padding=padding, dtype=self.dtype, name="conv")(x)


class Upsample2D(nn.Module):
    """Doubles the resolution by repetition, then a 3 x 3 convolution."""

    out_channels: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return Conv(self.out_channels, 3, padding=1, dtype=self.dtype, name="conv")(upsample_nearest(x))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResnetOptions:
    """What all residual blocks and attentions of one network have in common.

    Attributes:
      groups, eps: options of the group norms.
      time_scale_shift: "default" adds the projected embedding before the second norm; "scale_shift" acts after it.
      dropout: rate before the second convolution, from the rng collection "dropout".
      dtype, remat: as in `models.unet.UNet`.
    """

    groups: int = 32
    eps: float = 1e-5
    act_fn: str = "silu"
    time_scale_shift: str = "default"
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @classmethod
    def of(cls, unet) -> "ResnetOptions":
        """Returns the options that the fields of a UNet set."""
        return cls(
            groups=unet.norm_num_groups,
            eps=unet.norm_eps,
            act_fn=unet.act_fn,
            time_scale_shift=unet.resnet_time_scale_shift,
            dropout=unet.dropout,
            dtype=unet.dtype,
            remat=unet.remat,
        )

    def resnet(self, out_channels: int, name: str, **fields) -> "ResnetBlock2D":
        """Returns a residual block with these options."""
        block = nn.remat(ResnetBlock2D, static_argnums=(3,)) if self.remat else ResnetBlock2D
        return block(out_channels, self, name=name, **fields)


class ResnetBlock2D(nn.Module):
    """Norm, activation and convolution, twice, and a shortcut around them; the time embedding enters between the two.

    Attributes:
      out_channels: channels of the result; if they differ from the input's, the shortcut is a 1 x 1 convolution.
      options: see `ResnetOptions`.
      output_scale_factor: what the sum with the shortcut is divided by.
      up, down: whether the resolution changes, between the first activation and the first convolution, and on the shortcut.
    """

    out_channels: int
    options: ResnetOptions
    output_scale_factor: float = 1.0
    up: bool = False
    down: bool = False

    @nn.compact
    def __call__(self, x: Array, temb: Array | None = None, deterministic: bool = True) -> Array:
        """Maps `[B, H, W, C]` and the time embedding `[B, D]` (None if the network has none) to `[B, H', W', out_channels]`."""
        groups, eps, dtype = self.options.groups, self.options.eps, self.options.dtype
        act, scale_shift = activation(self.options.act_fn), self.options.time_scale_shift == "scale_shift"
        hidden = act(GroupNorm(groups, eps, dtype, name="norm1")(x))
        if self.up:
            x, hidden = upsample_nearest(x), upsample_nearest(hidden)
        elif self.down:
            x, hidden = downsample_mean(x), downsample_mean(hidden)
        hidden = Conv(self.out_channels, 3, padding=1, dtype=dtype, name="conv1")(hidden)

        if temb is not None:
            width = 2 * self.out_channels if scale_shift else self.out_channels
            temb_B11C = nn.Dense(width, dtype=dtype, name="time_emb_proj")(act(temb))[:, None, None, :]
            if not scale_shift:
                hidden = hidden + temb_B11C
        hidden = GroupNorm(groups, eps, dtype, name="norm2")(hidden)
        if temb is not None and scale_shift:
            scale_B11C, shift_B11C = jnp.split(temb_B11C, 2, axis=-1)
            hidden = hidden * (1.0 + scale_B11C) + shift_B11C

        hidden = nn.Dropout(self.options.dropout)(act(hidden), deterministic=deterministic)
        hidden = Conv(self.out_channels, 3, padding=1, dtype=dtype, name="conv2")(hidden)
        if x.shape[-1] != self.out_channels:
            x = Conv(self.out_channels, 1, padding=0, dtype=dtype, name="conv_shortcut")(x)
        hidden = x.astype(hidden.dtype) + hidden
        return hidden if self.output_scale_factor == 1.0 else hidden / self.output_scale_factor
