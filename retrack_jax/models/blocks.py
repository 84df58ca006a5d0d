"""The down, middle and up blocks of UNet2D: one module for each direction, with two fields for its kind.

    block type in diffusers                             | attention | resampler
    DownBlock2D, UpBlock2D                              | no        | conv
    AttnDownBlock2D, AttnUpBlock2D                      | yes       | `downsample_type`, `upsample_type`: conv or resnet
    ResnetDownsampleBlock2D, ResnetUpsampleBlock2D      | no        | resnet
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from retrack_jax.models.attention import Attention
from retrack_jax.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from retrack_jax.notation import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResnetOptions:
    """What all residual blocks and attentions of one network have in common; see `ResnetBlock2D`."""

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

    def resnet(self, out_channels: int, name: str, **fields) -> ResnetBlock2D:
        """Returns a residual block with these options; with `remat`, its backward pass computes the activations again."""
        block = nn.remat(ResnetBlock2D, static_argnums=(3,)) if self.remat else ResnetBlock2D
        return block(
            out_channels=out_channels,
            groups=self.groups,
            eps=self.eps,
            non_linearity=self.act_fn,
            time_embedding_norm=self.time_scale_shift,
            dropout=self.dropout,
            dtype=self.dtype,
            name=name,
            **fields,
        )

    def attention(self, channels: int, head_dim: int | None, name: str, **fields) -> Attention:
        """Returns a residual attention; `head_dim` is channels per head (`attention_head_dim`), None means one head."""
        head_dim = head_dim or channels
        block = nn.remat(Attention) if self.remat else Attention
        return block(
            heads=channels // head_dim,
            dim_head=head_dim,
            bias=True,
            eps=self.eps,
            residual_connection=True,
            dtype=self.dtype,
            name=name,
            **({"norm_num_groups": self.groups} | fields),
        )


class DownBlock2D(nn.Module):
    """`num_layers` residual blocks, each with attention if `add_attention`, then `resampler`: "conv", "resnet" or None."""

    out_channels: int
    num_layers: int
    options: ResnetOptions
    add_attention: bool = False
    attention_head_dim: int | None = None
    resampler: str | None = "conv"
    downsample_padding: int = 1

    @nn.compact
    def __call__(self, x: Array, temb: Array, deterministic: bool = True) -> tuple[Array, list[Array]]:
        """Returns the result and what the up block will read: the output of each layer and of the resampler."""
        skips = []
        for i in range(self.num_layers):
            x = self.options.resnet(self.out_channels, f"resnets_{i}")(x, temb, deterministic)
            if self.add_attention:
                x = self.options.attention(self.out_channels, self.attention_head_dim, f"attentions_{i}")(x)
            skips.append(x)
        if self.resampler == "conv":
            down = Downsample2D(self.out_channels, self.downsample_padding, self.options.dtype, name="downsamplers_0")
            skips.append(x := down(x))
        elif self.resampler == "resnet":
            skips.append(x := self.options.resnet(self.out_channels, "downsamplers_0", down=True)(x, temb, deterministic))
        return x, skips


class UNetMidBlock2D(nn.Module):
    """Two residual blocks with an attention between them (none unless `add_attention`).

    `attn_groups` None means the groups of the residual blocks, or no norm at all with time_scale_shift "scale_shift", as in
    diffusers.
    """

    options: ResnetOptions
    add_attention: bool = True
    attention_head_dim: int | None = None
    attn_groups: int | None = None
    output_scale_factor: float = 1.0

    @nn.compact
    def __call__(self, x: Array, temb: Array, deterministic: bool = True) -> Array:
        channels, scale = x.shape[-1], self.output_scale_factor
        x = self.options.resnet(channels, "resnets_0", output_scale_factor=scale)(x, temb, deterministic)
        if self.add_attention:
            groups = self.attn_groups
            if groups is None and self.options.time_scale_shift == "default":
                groups = self.options.groups
            fields = {"norm_num_groups": groups, "rescale_output_factor": scale}
            x = self.options.attention(channels, self.attention_head_dim, "attentions_0", **fields)(x)
        return self.options.resnet(channels, "resnets_1", output_scale_factor=scale)(x, temb, deterministic)


class UpBlock2D(nn.Module):
    """The mirror of `DownBlock2D`: each residual block also reads one of `skips`, last first."""

    out_channels: int
    num_layers: int
    options: ResnetOptions
    add_attention: bool = False
    attention_head_dim: int | None = None
    resampler: str | None = "conv"

    @nn.compact
    def __call__(self, x: Array, skips: list[Array], temb: Array, deterministic: bool = True) -> Array:
        """Maps `x` and `num_layers` arrays of the down blocks to the next higher resolution."""
        for i, skip in enumerate(reversed(skips)):
            x = jnp.concatenate([x, skip], axis=-1)
            x = self.options.resnet(self.out_channels, f"resnets_{i}")(x, temb, deterministic)
            if self.add_attention:
                x = self.options.attention(self.out_channels, self.attention_head_dim, f"attentions_{i}")(x)
        if self.resampler == "conv":
            x = Upsample2D(self.out_channels, self.options.dtype, name="upsamplers_0")(x)
        elif self.resampler == "resnet":
            x = self.options.resnet(self.out_channels, "upsamplers_0", up=True)(x, temb, deterministic)
        return x
