"""AutoencoderKL: Stable Diffusion's autoencoder between images and latents, in Flax with diffusers' names.

What it shares with VQModel (vqvae.py) is in `Autoencoder`.

    (1) z ~ N(mean, std²)                               the posterior of an image x
        [mean, logvar] = quant_conv(encoder(x))
        std = exp(clip(logvar, -30, 20) / 2)
    (2) latent = scaling_factor * (z - shift_factor)    all that the network sees; z may also be the mean
    (3) x = decoder(post_quant_conv(latent / scaling_factor + shift_factor))
    (4) latent = scaling_factor * (z - latents_mean) / latents_std, and its inverse in (3), if a config has these

The shift is Stable Diffusion 3's alone; None stands for 0. A mean and a standard deviation for each channel of z are those of
some Stable Diffusion XL folders, such as Playground 2.5's.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from retrack_jax.checks import check, check_int, check_number
from retrack_jax.models.attention import GroupNorm
from retrack_jax.models.blocks import AttentionOptions, DownBlock2D, UNetMidBlock2D, UpBlock2D
from retrack_jax.models.config_format import Configured, check_block_types
from retrack_jax.models.conv import Conv
from retrack_jax.models.embeddings import activation, silu
from retrack_jax.models.resnet import ResnetOptions
from retrack_jax.notation import Array

_EPS = 1e-6


class _Half(nn.Module):
    """The fields that both halves of the autoencoder have."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    out_channels: int
    options: ResnetOptions
    attention: AttentionOptions | None


class Encoder(_Half):
    """Images to the features that `quant_conv` reads; each level but the last halves the size."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels, options = self.block_out_channels, self.options
        x = Conv(channels[0], 3, padding=1, dtype=options.dtype, name="conv_in")(x)
        for i, width in enumerate(channels):
            fields = (self.layers_per_block, options, None, "conv" if i < len(channels) - 1 else None, 0)
            x, _ = DownBlock2D(width, *fields, name=f"down_blocks_{i}")(x, None)
        x = UNetMidBlock2D(options, self.attention, name="mid_block")(x, None)
        return _out(options, x, self.out_channels)


class Decoder(_Half):
    """Latents to images; each level but the last doubles the size."""

    @nn.compact
    def __call__(self, z: Array) -> Array:
        channels, options = self.block_out_channels[::-1], self.options
        x = Conv(channels[0], 3, padding=1, dtype=options.dtype, name="conv_in")(z)
        x = UNetMidBlock2D(options, self.attention, name="mid_block")(x, None)
        for i, width in enumerate(channels):
            block = UpBlock2D(width, options, resampler="conv" if i < len(channels) - 1 else None, name=f"up_blocks_{i}")
            x = block(x, [None] * (self.layers_per_block + 1), None)
        return _out(options, x, self.out_channels)


def _out(options: ResnetOptions, x: Array, features: int) -> Array:
    """The last norm, SiLU (for every act_fn, as in diffusers) and convolution."""
    x = silu(GroupNorm(options.groups, _EPS, options.dtype, name="conv_norm_out")(x))
    return Conv(features, 3, padding=1, dtype=options.dtype, name="conv_out")(x)


class Autoencoder(Configured, nn.Module):
    """What the autoencoders of latent diffusion models have in common; fields and defaults are diffusers'.

    Call `apply` with a method of each of them:

      encode: images `[B, H, W, in_channels]` in [-1, 1], with sides that are multiples of `downscale` (else `UserError`), to the
        latent of each, float32 `[B, h, w, latent_width]`: mean and standard deviation of its posterior, or the latent alone if
        it is certain. They are already multiplied by `scaling_factor`, as the network sees them.
      decode: the network's latents to images, float32 `[B, H, W, out_channels]`, about in [-1, 1], not clipped.

    Attributes:
      scaling_factor: the factor of latents, with which their variance is about 1.
      dtype: the dtype of the computation; norm statistics, softmax and the results are float32.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: Any = 32
    scaling_factor: float = 0.18215
    mid_block_add_attention: bool = True
    dtype: jnp.dtype = jnp.float32

    def check_options(self) -> None:
        """Raises `UserError`, naming the field, for options that are not supported or do not fit together."""
        check_block_types(self, down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",))
        check_int("the VAE's layers_per_block", self.layers_per_block)
        check_number("the VAE's scaling_factor", self.scaling_factor, 0, above=True)
        activation(self.act_fn)

    def _set_up(self, features: int) -> None:
        """Makes both halves; the encoder gives `features` channels."""
        options = ResnetOptions(groups=self.norm_num_groups, eps=_EPS, act_fn=self.act_fn, dtype=self.dtype)
        shape = (self.block_out_channels, self.layers_per_block)
        attention = None
        if self.mid_block_add_attention:  # one head
            attention = AttentionOptions(head_dim=None, norm_num_groups=self.norm_num_groups)
        self.encoder = Encoder(*shape, features, options, attention)
        self.decoder = Decoder(*shape, self.out_channels, options, attention)

    def _pointwise(self, features: int) -> Conv:
        return Conv(features, 1, padding=0, dtype=self.dtype)

    @property
    def downscale(self) -> int:
        """How many pixels along a side one latent covers (8 for Stable Diffusion)."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def latent_width(self) -> int:
        """How many channels a latent has."""
        return self.latent_channels

    def _check_sides(self, x_BHWC: Array) -> None:
        height, width = x_BHWC.shape[1:3]
        whole = height % self.downscale == 0 and width % self.downscale == 0
        check(whole, f"images are {height} x {width}; the VAE needs multiples of {self.downscale}")

    def __call__(self, x_BHWC: Array) -> Array:
        """Encodes, and decodes the mean; this is what `init` traces."""
        return self.decode(self.encode(x_BHWC)[0])


class AutoencoderKL(Autoencoder):
    """The autoencoder whose latents have a posterior (equations 1 to 4)."""

    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    class_name, passed_over = "AutoencoderKL", ("force_upcast",)  # a precision; checkpoints/stable_diffusion.py heeds it for XL

    def check_options(self) -> None:
        super().check_options()
        sizes = {None if each is None else len(each) for each in (self.latents_mean, self.latents_std)}
        check(
            sizes in ({None}, {self.latent_channels}),
            f"the VAE's latents_mean is {self.latents_mean} and its latents_std is {self.latents_std}; each must have a number "
            f"for each of the {self.latent_channels} channels of latents, or both be null",
        )

    def setup(self):
        self._set_up(2 * self.latent_channels)
        if self.use_quant_conv:
            self.quant_conv = self._pointwise(2 * self.latent_channels)
        if self.use_post_quant_conv:
            self.post_quant_conv = self._pointwise(self.latent_channels)

    def encode(self, x_BHWC: Array) -> tuple[Array, Array]:
        """Returns mean and standard deviation of the latent of each image (equations 1, 2 and 4), as `Autoencoder.encode`."""
        self._check_sides(x_BHWC)
        moments = self.encoder(x_BHWC)
        moments = self.quant_conv(moments) if self.use_quant_conv else moments
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        std = jnp.exp(0.5 * jnp.clip(logvar, -30.0, 20.0))
        mean = mean if self.shift_factor is None else mean - self.shift_factor
        if self.latents_mean is not None:
            deviation = _by_channel(self.latents_std)
            mean, std = (mean - _by_channel(self.latents_mean)) / deviation, std / deviation
        return mean * self.scaling_factor, std * self.scaling_factor

    def decode(self, latent_BHWC: Array) -> Array:
        """Returns images from the UNet's latents (equations 3 and 4), as `Autoencoder.decode`."""
        z = latent_BHWC / self.scaling_factor
        if self.latents_mean is not None:
            z = z * _by_channel(self.latents_std) + _by_channel(self.latents_mean)
        z = z if self.shift_factor is None else z + self.shift_factor
        z = self.post_quant_conv(z) if self.use_post_quant_conv else z
        return self.decoder(z).astype(jnp.float32)


def _by_channel(values: tuple[float, ...]) -> Array:
    return jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1)
