"""UNet2D: diffusers' `UNet2DModel` in Flax, with the same names of fields and submodules, for images `[B, H, W, C]`."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from retrack_jax.checks import check, check_choice, check_int
from retrack_jax.models.blocks import Attending, AttentionOptions
from retrack_jax.models.embeddings import GaussianFourierProjection
from retrack_jax.models.unet import UNet
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


class UNet2D(UNet):
    """The UNet of DDPM, with or without class labels.

    Defaults are diffusers', and `attention_head_dim` is channels per head. The embedding of the class is added to that of the
    time:

        num_class_embeds                 a trained row for each label in [0, num_class_embeds)
        class_embed_type "timestep"      labels are numbers, embedded like the time, but by separate dense layers
        class_embed_type "identity"      what the caller passes, `[B, D']`: it is the embedding already
    """

    time_embedding_type: str = "positional"
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    attention_head_dim: int | None = 8
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    attn_norm_num_groups: int | None = None
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None

    class_name = "UNet2DModel"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **own_fields) -> "UNet2D":
        """Returns the module for diffusers' `config.json`, as `Configured.from_config`.

        Absent keys take the defaults, which every version of diffusers shares, with one exception: before 0.17, the middle
        attention of a `scale_shift` network had a group norm, and there was no option for it.
        """
        if config.get("resnet_time_scale_shift") == "scale_shift" and _before_0_17(config):
            config = {"attn_norm_num_groups": config.get("norm_num_groups", cls.norm_num_groups), **config}
        return super().from_config(config, **own_fields)

    def check_options(self) -> None:
        """Raises `UserError`, naming the field, for options that are not supported or do not fit together."""
        check_choice("time_embedding_type", self.time_embedding_type, ("positional", "fourier", "learned"))
        learned = self.time_embedding_type == "learned"
        check(not learned or self.num_train_timesteps, "time_embedding_type 'learned' needs num_train_timesteps")
        check_choice("class_embed_type", str(self.class_embed_type), ("None", "timestep", "identity"))
        if self.num_class_embeds is not None:
            check_int("num_class_embeds", self.num_class_embeds)
        check_choice("downsample_type", self.downsample_type, ("conv", "resnet"))
        check_choice("upsample_type", self.upsample_type, ("conv", "resnet"))
        self._check_blocks("UNetMidBlock2D", plain=_plain, down_block_types=_DOWN_BLOCKS, up_block_types=_UP_BLOCKS)
        widths, head_dim, groups = self.block_out_channels, self.attention_head_dim, self.attn_norm_num_groups
        attending = [c for c, (attends, _) in zip(widths, self._kinds(_DOWN_BLOCKS), strict=True) if attends]
        attending += [c for c, (attends, _) in zip(reversed(widths), self._kinds(_UP_BLOCKS), strict=True) if attends]
        attending += [widths[-1]] if self.add_attention and self.mid_block_type else []
        check(
            head_dim is None or all(0 < head_dim <= channels for channels in attending),
            f"attention_head_dim is {head_dim!r}; it counts channels per head, and one attention has {min(attending, default=0)}",
        )
        check(
            groups is None or widths[-1] % groups == 0,
            f"attn_norm_num_groups is {groups!r}; it must divide the last of block_out_channels {widths}",
        )

    @property
    def takes_labels(self) -> bool:
        """Whether the network takes a class for each image."""
        return self.class_embed_type is not None or self.num_class_embeds is not None

    @property
    def num_labels(self) -> int | None:
        """How many labels the network knows, from 0 on; None: any number."""
        if self.class_embed_type is None:
            return self.num_class_embeds
        return self.num_train_timesteps if self.time_embedding_type == "learned" else None

    @property
    def smallest_label(self) -> tuple[Array, ...]:
        """The class of one image, as `__call__` takes it; nothing for an unconditional network."""
        if not self.takes_labels:
            return ()
        identity = self.class_embed_type == "identity"
        return (jnp.zeros((1, self._embedding_width)) if identity else jnp.zeros((1,), jnp.int32),)

    def _kinds(self, table: Mapping[str, tuple[bool, str | None]]) -> list[tuple[bool, str | None]]:
        types = self.down_block_types if table is _DOWN_BLOCKS else self.up_block_types
        return [table[_plain(kind)] for kind in types]

    @nn.compact
    def __call__(self, x_t: Array, t: Array, class_labels: Array | None = None, deterministic: bool = True) -> Array:
        """Returns the prediction for noisy images, float32 `[B, H, W, out_channels]`.

        Args:
          x_t: `[B, H, W, in_channels]`; H and W are multiples of 2^(blocks - 1).
          t: timesteps `[B]`, int or float.
          class_labels: labels, int32 `[B]`, or `[1]` for all images; with "identity" embeddings `[B or 1, D']`. None for an
            unconditional network.
          deterministic: False turns dropout on, which draws from the rng collection "dropout".

        Raises `UserError` at tracing if the options or the shapes do not fit.
        """
        self.check_options()
        self._check_shapes(x_t, t)
        self._check_labels(x_t, class_labels)
        attention = AttentionOptions(head_dim=self.attention_head_dim, norm_num_groups=self.norm_num_groups)

        def plan(table: Mapping, resampler: str) -> Sequence[tuple[Attending, str]]:
            return [(attention if attends else None, own or resampler) for attends, own in self._kinds(table)]

        # Without attn_norm_num_groups, "scale_shift" means no norm in the middle attention, as in diffusers.
        groups = self.norm_num_groups if self.resnet_time_scale_shift == "default" else None
        if self.attn_norm_num_groups is not None:
            groups = self.attn_norm_num_groups
        middle = {"norm_num_groups": groups, "rescale_output_factor": float(self.mid_block_scale_factor)}
        # The activation of time embedding and output is SiLU whatever act_fn is, as in diffusers.
        x = self._through_blocks(
            x_t,
            self._time_and_class(t, class_labels),
            down=plan(_DOWN_BLOCKS, self.downsample_type),
            mid=dataclasses.replace(attention, **middle) if self.add_attention else None,
            up=plan(_UP_BLOCKS, self.upsample_type),
            deterministic=deterministic,
        )
        return x / t.astype(jnp.float32)[:, None, None, None] if self.time_embedding_type == "fourier" else x

    def _check_labels(self, x_t: Array, class_labels: Array | None) -> None:
        if not self.takes_labels:
            check(class_labels is None, "the network is unconditional and was given class labels")
            return
        check(class_labels is not None, "the network takes class labels and was given none")
        example = self.smallest_label[0]
        fits = class_labels.shape[1:] == example.shape[1:] and class_labels.shape[:1] in ((1,), x_t.shape[:1])
        check(
            fits, f"class_labels have shape {class_labels.shape}; they need {[len(x_t), *example.shape[1:]]}, one for each image"
        )

    def _time_and_class(self, t: Array, class_labels: Array | None) -> Array:
        if self.class_embed_type == "timestep":
            # One call for both, because a time_proj that has parameters is one module.
            both = self._frequencies(jnp.concatenate([t, class_labels.astype(t.dtype)]))
            embedding = self._time_embedding(both[len(t) :], name="class_embedding")
            return self._time_embedding(both[: len(t)]) + embedding
        temb = self._time_embedding(self._frequencies(t))
        if not self.takes_labels:
            return temb
        if self.class_embed_type == "identity":
            return temb + class_labels.astype(self.dtype)
        table = nn.Embed(self.num_class_embeds, self._embedding_width, dtype=self.dtype, name="class_embedding")
        return temb + table(class_labels)

    def _frequencies(self, t: Array) -> Array:
        dim = self.block_out_channels[0]
        if self.time_embedding_type == "fourier":
            return GaussianFourierProjection(dim, name="time_proj")(t)
        if self.time_embedding_type == "learned":
            return nn.Embed(self.num_train_timesteps, dim, name="time_proj")(t)
        return super()._frequencies(t)


def _plain(block_type: str) -> str:
    """Removes the prefix `UNetRes` that block types have in some early configs."""
    return str(block_type).removeprefix("UNetRes")


def _before_0_17(config: Mapping[str, Any]) -> bool:
    version = re.match(r"(\d{1,4})\.(\d{1,4})", str(config.get("_diffusers_version", "")))
    return version is not None and tuple(map(int, version.groups())) < (0, 17)
