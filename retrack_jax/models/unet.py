"""What diffusers' UNets share: fields, checks, and the way through the blocks."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from retrack_jax.checks import check, check_choice, check_int
from retrack_jax.models.attention import GroupNorm
from retrack_jax.models.blocks import Attending, DownBlock2D, UNetMidBlock2D, UpBlock2D
from retrack_jax.models.config_format import Configured, check_block_types
from retrack_jax.models.conv import Conv
from retrack_jax.models.embeddings import TimestepEmbedding, activation, timestep_embedding
from retrack_jax.models.resnet import ResnetOptions
from retrack_jax.notation import Array


class UNet(Configured, nn.Module):
    """The skeleton of `UNet2D` and `UNet2DCondition`.

    Attributes:
      dtype: the dtype of the computation; parameters, norm statistics, softmax and the result are float32.
      remat: whether the backward pass computes the activations of residual and attention blocks again, to save memory.
      All others are diffusers'.

    New parameters are drawn as Flax does: kernels from lecun_normal (variance 1/fan_in), biases 0, norm scales 1.
    """

    sample_size: Any = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_dim: int | None = None
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ()
    mid_block_type: str | None = None
    up_block_types: tuple[str, ...] = ()
    block_out_channels: tuple[int, ...] = ()
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1
    downsample_padding: int = 1
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: Any = 8
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    def _check_blocks(self, mid_block_type: str, **kinds) -> None:
        """Raises `UserError`, naming the field, for shared options that are not supported; `kinds` as in `check_block_types`."""
        check_block_types(self, **kinds)
        check_choice("mid_block_type", str(self.mid_block_type), (mid_block_type, "None"))
        check_choice("resnet_time_scale_shift", self.resnet_time_scale_shift, ("default", "scale_shift"))
        check_int("layers_per_block", self.layers_per_block)
        activation(self.act_fn)

    def _check_shapes(self, x_t: Array, t: Array) -> None:
        fits = x_t.ndim == 4 and x_t.shape[-1] == self.in_channels
        check(fits, f"x_t has shape {x_t.shape}; {type(self).__name__} needs [B, H, W, {self.in_channels}]")
        (height, width), blocks = x_t.shape[1:3], len(self.block_out_channels)
        fits = height % 2 ** (blocks - 1) == 0 and width % 2 ** (blocks - 1) == 0
        check(fits, f"x_t is {height} x {width}; with {blocks} blocks both must be multiples of {2 ** (blocks - 1)}")
        check(t.shape == x_t.shape[:1], f"t has shape {t.shape}; it needs one timestep for each of {x_t.shape[0]} images")

    def _frequencies(self, t: Array) -> Array:
        """Returns the embedding of timesteps `[B]` that the dense layers read, `[B, D]`."""
        dim = self.block_out_channels[0]
        return timestep_embedding(t, dim, flip_sin_to_cos=self.flip_sin_to_cos, freq_shift=self.freq_shift)

    @property
    def _embedding_width(self) -> int:
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    def _time_embedding(self, frequencies: Array, act_fn: str = "silu", name: str = "time_embedding") -> Array:
        """Returns what residual blocks read, `[B, D']`, from what `_frequencies` returns."""
        return TimestepEmbedding(self._embedding_width, act_fn, self.dtype, name=name)(frequencies)

    def _through_blocks(
        self,
        x_t: Array,
        temb: Array,
        *,
        down: Sequence[tuple[Attending, str]],
        mid: Attending,
        up: Sequence[tuple[Attending, str]],
        prompt: Array | None = None,
        act_fn: str = "silu",
        deterministic: bool,
    ) -> Array:
        """Returns the prediction, float32 `[B, H, W, out_channels]`.

        `temb` `[B, D']` is the embedding of time and class. `down` and `up` say for each block what attends in it, and its
        resampler, which the last block does not use; `mid` says what attends in the middle. Transformers attend to `prompt`
        `[B, M, D]`. `act_fn` is the activation of the output.
        """
        options, channels, last = ResnetOptions.of(self), self.block_out_channels, len(self.block_out_channels) - 1
        x = 2.0 * x_t - 1.0 if self.center_input_sample else x_t
        x = Conv(channels[0], 3, padding=1, dtype=self.dtype, name="conv_in")(x)

        skips = [x]
        for i, (attention, resampler) in enumerate(down):
            fields = (options, attention, resampler if i < last else None, self.downsample_padding)
            block = DownBlock2D(channels[i], self.layers_per_block, *fields, name=f"down_blocks_{i}")
            x, more = block(x, temb, prompt, deterministic)
            skips += more
        if self.mid_block_type is not None:
            middle = UNetMidBlock2D(options, mid, float(self.mid_block_scale_factor), name="mid_block")
            x = middle(x, temb, prompt, deterministic)
        layers = self.layers_per_block + 1
        for i, (attention, resampler) in enumerate(up):
            block = UpBlock2D(channels[last - i], options, attention, resampler if i < last else None, name=f"up_blocks_{i}")
            x = block(x, skips[-layers:], temb, prompt, deterministic)
            skips = skips[:-layers]

        x = activation(act_fn)(GroupNorm(self.norm_num_groups, self.norm_eps, self.dtype, name="conv_norm_out")(x))
        return Conv(self.out_channels, 3, padding=1, dtype=self.dtype, name="conv_out")(x).astype(jnp.float32)
