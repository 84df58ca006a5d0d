"""The down, middle and up blocks of all UNets and of the autoencoder: one module for each direction.

A block's kind in diffusers says what follows each residual block (nothing, an attention or a transformer) and how the resolution
changes at its end. Here these are the fields `attention` and `resampler`.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from retrack_jax.models.attention import Attention
from retrack_jax.models.resnet import Downsample2D, ResnetOptions, Upsample2D
from retrack_jax.models.transformer2d import Transformer2DModel
from retrack_jax.notation import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """The residual self-attentions of a block: channels per head (None: one head), and fields of `Attention`."""

    head_dim: int | None
    norm_num_groups: int | None
    rescale_output_factor: float = 1.0

    def layer(self, options: ResnetOptions, channels: int, name: str) -> Attention:
        """Returns one attention with the block's epsilon, dtype and remat."""
        head_dim = self.head_dim or channels
        block = nn.remat(Attention) if options.remat else Attention
        return block(
            heads=channels // head_dim,
            dim_head=head_dim,
            bias=True,
            norm_num_groups=self.norm_num_groups,
            eps=options.eps,
            residual_connection=True,
            rescale_output_factor=self.rescale_output_factor,
            dtype=options.dtype,
            name=name,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerOptions:
    """The transformers of a block, which attend to a prompt; see `Transformer2DModel`."""

    heads: int
    num_layers: int
    use_linear_projection: bool

    def layer(self, options: ResnetOptions, channels: int, name: str) -> Transformer2DModel:
        """Returns one transformer with the block's norm groups, dtype and remat; its width is that of its input."""
        fields = (self.heads, self.num_layers, options.groups, self.use_linear_projection, options.dtype, options.remat)
        return Transformer2DModel(*fields, name=name)


Attending = AttentionOptions | TransformerOptions | None


class DownBlock2D(nn.Module):
    """`num_layers` residual blocks, each followed by `attention`, then `resampler`: "conv", "resnet" or None."""

    out_channels: int
    num_layers: int
    options: ResnetOptions
    attention: Attending = None
    resampler: str | None = "conv"
    downsample_padding: int = 1

    @nn.compact
    def __call__(
        self, x: Array, temb: Array | None, prompt: Array | None = None, deterministic: bool = True
    ) -> tuple[Array, list[Array]]:
        """Returns the result and what the up block will read: the output of each layer and of the resampler."""
        skips, options, width = [], self.options, self.out_channels
        for i in range(self.num_layers):
            x = options.resnet(width, f"resnets_{i}")(x, temb, deterministic)
            if self.attention:
                x = self.attention.layer(options, width, f"attentions_{i}")(x, prompt)
            skips.append(x)
        if self.resampler == "conv":
            skips.append(x := Downsample2D(width, self.downsample_padding, options.dtype, name="downsamplers_0")(x))
        elif self.resampler == "resnet":
            skips.append(x := options.resnet(width, "downsamplers_0", down=True)(x, temb, deterministic))
        return x, skips


class UNetMidBlock2D(nn.Module):
    """Two residual blocks with `attention` between them."""

    options: ResnetOptions
    attention: Attending = None
    output_scale_factor: float = 1.0

    @nn.compact
    def __call__(self, x: Array, temb: Array | None, prompt: Array | None = None, deterministic: bool = True) -> Array:
        channels, scale = x.shape[-1], self.output_scale_factor
        x = self.options.resnet(channels, "resnets_0", output_scale_factor=scale)(x, temb, deterministic)
        if self.attention:
            x = self.attention.layer(self.options, channels, "attentions_0")(x, prompt)
        return self.options.resnet(channels, "resnets_1", output_scale_factor=scale)(x, temb, deterministic)


class UpBlock2D(nn.Module):
    """The mirror of `DownBlock2D`: one residual block for each entry of `skips`, which it also reads, last first.

    An entry that is None is not read: the autoencoder's decoder has no skips.
    """

    out_channels: int
    options: ResnetOptions
    attention: Attending = None
    resampler: str | None = "conv"

    @nn.compact
    def __call__(
        self,
        x: Array,
        skips: list[Array] | list[None],
        temb: Array | None,
        prompt: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        options, width = self.options, self.out_channels
        for i, skip in enumerate(reversed(skips)):
            x = x if skip is None else jnp.concatenate([x, skip], axis=-1)
            x = options.resnet(width, f"resnets_{i}")(x, temb, deterministic)
            if self.attention:
                x = self.attention.layer(options, width, f"attentions_{i}")(x, prompt)
        if self.resampler == "conv":
            x = Upsample2D(width, options.dtype, name="upsamplers_0")(x)
        elif self.resampler == "resnet":
            x = options.resnet(width, "upsamplers_0", up=True)(x, temb, deterministic)
        return x
