"""UNet2DCondition: diffusers' `UNet2DConditionModel` in Flax, for Stable Diffusion 1.x, 2.x and XL.

It shares its layers with `UNet2D` and adds blocks with cross-attention to a prompt. In these configs `attention_head_dim` is the
*number* of heads: an old mistake of diffusers, on which checkpoints now depend.

The UNet of Stable Diffusion XL also takes the prompt's pooled embedding p and six numbers s about the picture's size. With
`addition_embed_type` "text_time" they are added to the embedding of the time, e being equation (2) of embeddings.py:

    (1) temb = time_embedding(e(t)) + add_embedding([p, e(s_1), ..., e(s_6)])
"""

import flax.linen as nn
import jax.numpy as jnp

from retrack_jax.checks import check, check_choice, check_int
from retrack_jax.models.blocks import TransformerOptions
from retrack_jax.models.embeddings import TimestepEmbedding, timestep_embedding
from retrack_jax.models.unet import UNet
from retrack_jax.notation import Array

# height and width of the picture, top and left of the crop, height and width of the result
NUM_TIME_IDS = 6
# Options of UNet2DConditionModel that are supported at one value only, which every Stable Diffusion checkpoint has.
_FIXED = {
    "attention_type": "default", "class_embed_type": None,
    "class_embeddings_concat": False, "conv_in_kernel": 3, "conv_out_kernel": 3, "cross_attention_norm": None,
    "dual_cross_attention": False, "encoder_hid_dim": None, "encoder_hid_dim_type": None, "mid_block_only_cross_attention": None,
    "num_attention_heads": None, "num_class_embeds": None, "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": False, "time_cond_proj_dim": None, "time_embedding_act_fn": None,
    "time_embedding_type": "positional", "timestep_post_act": None,
}  # fmt: skip
# Ignored: they matter only with an option above, or ask for a precision that is always used here (logits in float32).
_PASSED_OVER = ("addition_embed_type_num_heads", "attention_upcast")
Condition = Array | dict[str, Array]
_DOWN_BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP_BLOCKS = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}


class UNet2DCondition(UNet):
    """Stable Diffusion's UNet; fields and defaults are those of diffusers' `UNet2DConditionModel`.

    Attributes:
      attention_head_dim: number of heads, one for all blocks or one for each.
      cross_attention_dim: features of the prompt's tokens.
      transformer_layers_per_block: one for all blocks or one for each.
      reverse_transformer_layers_per_block: those of the up blocks, first to last; None: the down blocks' in reverse.
      upcast_attention: kept for an export; logits are float32 here in any case.
      addition_embed_type: "text_time" for equation (1), or None.
      addition_time_embed_dim: features of each e(s_i).
      projection_class_embeddings_input_dim: features of [p, e(s_1), ..., e(s_6)].
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
    reverse_transformer_layers_per_block: tuple[int, ...] | None = None
    use_linear_projection: bool = False
    upcast_attention: bool | None = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    class_name, fixed, passed_over = "UNet2DConditionModel", _FIXED, _PASSED_OVER

    def check_options(self) -> None:
        """Raises `UserError`, naming the field, for options that are not supported or do not fit together."""
        self._check_blocks("UNetMidBlock2DCrossAttn", down_block_types=_DOWN_BLOCKS, up_block_types=_UP_BLOCKS)
        check_int("cross_attention_dim", self.cross_attention_dim)
        for width, heads in zip(self.block_out_channels, self._per_block("attention_head_dim"), strict=True):
            fits = isinstance(heads, int) and heads > 0 and width % heads == 0
            check(fits, f"attention_head_dim is {heads!r}; it is the number of heads here and must divide {width} channels")
        for layers in (*self._per_block("transformer_layers_per_block"), *self._up_layers()):
            check_int("transformer_layers_per_block", layers)
        check_choice("addition_embed_type", str(self.addition_embed_type), ("None", "text_time"))
        if self.takes_sizes:
            check_int("addition_time_embed_dim", self.addition_time_embed_dim)
            least = NUM_TIME_IDS * self.addition_time_embed_dim + 1
            check_int("projection_class_embeddings_input_dim", self.projection_class_embeddings_input_dim, least)

    @property
    def takes_sizes(self) -> bool:
        """Whether the network takes a pooled prompt and six sizes too, as Stable Diffusion XL's does."""
        return self.addition_embed_type is not None

    @property
    def pooled_width(self) -> int:
        """Features of the pooled prompt, if the network takes one."""
        return self.projection_class_embeddings_input_dim - NUM_TIME_IDS * self.addition_time_embed_dim

    @property
    def smallest_condition(self) -> Condition:
        """A prompt of one token for one image, as `__call__` takes it."""
        prompt = jnp.zeros((1, 1, self.cross_attention_dim))
        if not self.takes_sizes:
            return prompt
        text_embeds, time_ids = jnp.zeros((1, self.pooled_width)), jnp.zeros((1, NUM_TIME_IDS))
        return {"encoder_hidden_states": prompt, "text_embeds": text_embeds, "time_ids": time_ids}

    @nn.compact
    def __call__(self, x_t: Array, t: Array, condition: Condition, deterministic: bool = True) -> Array:
        """Returns the prediction for noisy latents; the other arguments and the errors are those of `UNet2D`.

        `condition` is the prompt's embedding `[B, M, cross_attention_dim]`. With `takes_sizes` it is a dict: that embedding as
        `encoder_hidden_states`, the pooled one as `text_embeds` `[B, D]`, and `time_ids` `[B, 6]`: height and width of the
        picture, top and left of the crop, height and width of the result. Each leaf may also be one for all images, `[1, ...]`.
        """
        self.check_options()
        self._check_shapes(x_t, t)
        prompt = condition["encoder_hidden_states"] if self.takes_sizes else condition
        fits = prompt.ndim == 3 and prompt.shape[0] in (1, x_t.shape[0]) and prompt.shape[2] == self.cross_attention_dim
        check(
            fits,
            f"encoder_hidden_states has shape {prompt.shape}; it needs [{x_t.shape[0]} or 1, tokens, "
            f"{self.cross_attention_dim}]: take UNet and text encoder from one checkpoint",
        )
        temb = self._time_embedding(self._frequencies(t), self.act_fn)
        if self.takes_sizes:
            temb = temb + self._size_embedding(condition["text_embeds"], condition["time_ids"])

        def attention(heads: int, layers: int) -> TransformerOptions:
            return TransformerOptions(heads=heads, num_layers=layers, use_linear_projection=self.use_linear_projection)

        heads, layers = self._per_block("attention_head_dim"), self._per_block("transformer_layers_per_block")
        down = zip(self.down_block_types, map(attention, heads, layers), strict=True)
        up = zip(self.up_block_types, map(attention, reversed(heads), self._up_layers()), strict=True)
        return self._through_blocks(
            x_t,
            temb,
            down=[(one if _DOWN_BLOCKS[kind] else None, "conv") for kind, one in down],
            mid=attention(heads[-1], layers[-1]),
            up=[(one if _UP_BLOCKS[kind] else None, "conv") for kind, one in up],
            prompt=jnp.broadcast_to(prompt, (x_t.shape[0], *prompt.shape[1:])).astype(self.dtype),
            act_fn=self.act_fn,
            deterministic=deterministic,
        )

    def _size_embedding(self, text_embeds_BD: Array, time_ids_BS: Array) -> Array:
        """Returns the second term of equation (1), `[B or 1, D']`."""
        fits = text_embeds_BD.shape[1:] == (self.pooled_width,) and time_ids_BS.shape[1:] == (NUM_TIME_IDS,)
        check(
            fits and len(text_embeds_BD) == len(time_ids_BS),
            f"text_embeds and time_ids have shapes {text_embeds_BD.shape} and {time_ids_BS.shape}; they need as many rows, of "
            f"{self.pooled_width} and {NUM_TIME_IDS} numbers: take UNet and text encoders from one checkpoint",
        )
        how = {"flip_sin_to_cos": self.flip_sin_to_cos, "freq_shift": self.freq_shift}
        sizes = timestep_embedding(time_ids_BS.reshape(-1), self.addition_time_embed_dim, **how).reshape(len(time_ids_BS), -1)
        both = jnp.concatenate([text_embeds_BD.astype(jnp.float32), sizes], axis=-1)
        return TimestepEmbedding(self._embedding_width, dtype=self.dtype, name="add_embedding")(both)

    def _up_layers(self) -> tuple:
        """Returns how many transformer blocks the transformers of each up block have."""
        if self.reverse_transformer_layers_per_block is None:
            return self._per_block("transformer_layers_per_block")[::-1]
        return self._per_block("reverse_transformer_layers_per_block")

    def _per_block(self, field: str) -> tuple:
        """Returns the values of an option for all blocks; the field holds one for all, or one for each."""
        value, blocks = getattr(self, field), len(self.block_out_channels)
        if not isinstance(value, (tuple, list)):
            return (value,) * blocks
        check(len(value) == blocks, f"{field} has {len(value)} entries, block_out_channels {blocks}; they must be as many")
        return tuple(value)
