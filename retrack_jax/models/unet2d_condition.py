"""UNet2DCondition: diffusers' `UNet2DConditionModel` in Flax, for Stable Diffusion 1.x and 2.x.

It shares its layers with `UNet2D` and adds blocks with cross-attention to a prompt. In these configs `attention_head_dim` is the
*number* of heads: an old mistake of diffusers, on which checkpoints now depend.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from retrack_jax.checks import UserError, check, check_int
from retrack_jax.models.blocks import TransformerOptions
from retrack_jax.models.config_format import ConfigFormat
from retrack_jax.models.unet import UNet
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
_DOWN_BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP_BLOCKS = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}


class UNet2DCondition(UNet):
    """The UNet of Stable Diffusion 1.x and 2.x; fields and defaults are those of diffusers' `UNet2DConditionModel`.

    Attributes:
      attention_head_dim: number of heads, one for all blocks or one for each.
      cross_attention_dim: features of the prompt's tokens.
      transformer_layers_per_block: one for all blocks or one for each.
      All others are those of `UNet`.
    """

    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    use_linear_projection: bool = False

    config_format = ConfigFormat(class_name="UNet2DConditionModel", fixed=_FIXED, passed_over=_PASSED_OVER)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **own_fields) -> "UNet2DCondition":
        """Returns the module for diffusers' `unet/config.json`, as `Configured.from_config`; refuses SDXL's by name."""
        if config.get("addition_embed_type") == "text_time":
            raise UserError(
                "the config is of Stable Diffusion XL, which is not supported; give a Stable Diffusion 1.x or 2.x folder"
            )
        return super().from_config(config, **own_fields)

    def check_options(self) -> None:
        """Raises `UserError`, naming the field, for options that are not supported or do not fit together."""
        self._check_blocks("UNetMidBlock2DCrossAttn", down_block_types=_DOWN_BLOCKS, up_block_types=_UP_BLOCKS)
        check_int("cross_attention_dim", self.cross_attention_dim)
        for width, heads in zip(self.block_out_channels, self._per_block("attention_head_dim"), strict=True):
            fits = isinstance(heads, int) and heads > 0 and width % heads == 0
            check(fits, f"attention_head_dim is {heads!r}; it is the number of heads here and must divide {width} channels")
        for layers in self._per_block("transformer_layers_per_block"):
            check_int("transformer_layers_per_block", layers)

    @nn.compact
    def __call__(self, x_t: Array, t: Array, encoder_hidden_states: Array, deterministic: bool = True) -> Array:
        """Returns the prediction for noisy latents; the other arguments and the errors are those of `UNet2D`.

        `encoder_hidden_states` are prompt embeddings `[B, M, cross_attention_dim]`, or `[1, M, cross_attention_dim]` for all
        images.
        """
        self.check_options()
        self._check_shapes(x_t, t)
        prompt = encoder_hidden_states
        fits = prompt.ndim == 3 and prompt.shape[0] in (1, x_t.shape[0]) and prompt.shape[2] == self.cross_attention_dim
        check(
            fits,
            f"encoder_hidden_states has shape {prompt.shape}; it needs [{x_t.shape[0]} or 1, tokens, "
            f"{self.cross_attention_dim}]: take UNet and text encoder from one checkpoint",
        )
        per_block = zip(self._per_block("attention_head_dim"), self._per_block("transformer_layers_per_block"), strict=True)
        attention = [
            TransformerOptions(heads=heads, num_layers=layers, use_linear_projection=self.use_linear_projection)
            for heads, layers in per_block
        ]
        down = zip(self.down_block_types, attention, strict=True)
        up = zip(self.up_block_types, reversed(attention), strict=True)
        return self._through_blocks(
            x_t,
            self._time_embedding(self._frequencies(t), self.act_fn),
            down=[(one if _DOWN_BLOCKS[kind] else None, "conv") for kind, one in down],
            mid=attention[-1],
            up=[(one if _UP_BLOCKS[kind] else None, "conv") for kind, one in up],
            prompt=jnp.broadcast_to(prompt, (x_t.shape[0], *prompt.shape[1:])).astype(self.dtype),
            act_fn=self.act_fn,
            deterministic=deterministic,
        )

    def _per_block(self, field: str) -> tuple:
        """Returns the values of an option for all blocks; the field holds one for all, or one for each."""
        value, blocks = getattr(self, field), len(self.block_out_channels)
        if not isinstance(value, (tuple, list)):
            return (value,) * blocks
        check(len(value) == blocks, f"{field} has {len(value)} entries, block_out_channels {blocks}; they must be as many")
        return tuple(value)
