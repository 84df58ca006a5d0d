"""The names that CompVis' ldm gives the tensors of Stable Diffusion 1.x and 2.x, which single files of weights keep.

One file holds the UNet, the VAE and the text encoder, each behind its prefix. `places` says where the file keeps each tensor that
diffusers and transformers name; layouts differ in two cases, which `Place` describes.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from retrack_jax.weights.file_tensors import FileTensors

PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
OPEN_CLIP = "cond_stage_model.model."  # Stable Diffusion 2.x has OpenCLIP's text encoder, 1.x that of transformers
_CLIP = "cond_stage_model.transformer.text_model."
# Not read: buffers, the projection behind the text encoder, and OpenCLIP's last layer, which Stable Diffusion 2.x leaves out.
_UNREAD = re.compile(r"(state_dict\.)?cond_stage_model\..*(position_ids|logit_scale|text_projection|attn_mask|resblocks\.23\..*)")

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
_UNET_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_VAE = {
    r"\bmid_block\.resnets\.0\b": "mid.block_1", r"\bmid_block\.resnets\.1\b": "mid.block_2",
    r"\bmid_block\.attentions\.0\b": "mid.attn_1", r"\bgroup_norm\b": "norm", r"\bto_([qkv])\b": r"\1",
    r"\bto_out\.0\b": "proj_out", r"\bconv_shortcut\b": "nin_shortcut", r"\bconv_norm_out\b": "norm_out",
    r"\bresnets\b": "block", r"\bdownsamplers\.0\b": "downsample", r"\bupsamplers\.0\b": "upsample",
    r"\bdown_blocks\b": "down",
}  # fmt: skip
_TEXT = {
    r"embeddings\.token_embedding": "token_embedding", r"embeddings\.position_embedding\.weight": "positional_embedding",
    r"final_layer_norm": "ln_final", r"encoder\.layers": "transformer.resblocks", r"layer_norm([12])": r"ln_\1",
    r"mlp\.fc1": "mlp.c_fc", r"mlp\.fc2": "mlp.c_proj", r"self_attn": "attn",
}  # fmt: skip


class Place(NamedTuple):
    """Where a file keeps a tensor.

    Attributes:
      name: of the tensor in the file.
      convolution: whether the file has a linear layer `[out, in]` as a convolution `[out, in, 1, 1]`: the VAE's attention.
      third: which third of the rows it is, if query, key and value are one tensor: OpenCLIP's attention.
    """

    name: str
    convolution: bool = False
    third: int | None = None


def places(part: str, names: Iterable[str], open_clip: bool = False) -> dict[str, Place]:
    """Returns where a file keeps the tensors `names` of a part, a key of `PREFIXES`, as diffusers or transformers name them.

    Args:
      names: all tensors of the part, without transformers' leading `text_model.`.
      open_clip: whether the text encoder is Stable Diffusion 2.x's.
    """
    names = list(names)
    place = {"unet": _unet, "vae": _vae, "text_encoder": _open_clip if open_clip else _clip}[part]
    return {name: place(name, names) for name in names}


def _unet(name: str, names: list[str]) -> Place:
    prefix, (module, _, leaf) = PREFIXES["unet"], name.rpartition(".")
    if module in _UNET_ENDS:
        return Place(f"{prefix}{_UNET_ENDS[module]}.{leaf}")
    layers = _count(names, r"down_blocks\.0\.resnets\.(\d+)\.")
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        kind, index, rest = found.groups()
        block = f"middle_block.{2 * int(index) + (kind == 'attentions')}"
    else:
        side, number, kind, index, rest = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name).groups()
        slot = int(kind == "attentions")
        if kind == "upsamplers":
            index, slot = layers, 1 + any(other.startswith(f"up_blocks.{number}.attentions.") for other in names)
        elif kind == "downsamplers":
            index, rest = layers, rest.replace("conv", "op")
        start = int(number) * (layers + 1) + int(index)
        block = f"input_blocks.{1 + start}.{slot}" if side == "down" else f"output_blocks.{start}.{slot}"
    if kind == "resnets":
        layer, _, rest = rest.rpartition(".")
        rest = f"{_UNET_RESNET[layer]}.{rest}"
    return Place(f"{prefix}{block}.{rest}")


def _vae(name: str, names: list[str]) -> Place:
    last = _count(names, r"decoder\.up_blocks\.(\d+)\.") - 1
    renamed = re.sub(r"\bup_blocks\.(\d+)", lambda found: f"up.{last - int(found[1])}", _renamed(name, _VAE))
    linear = "attentions" in name and "norm" not in name and name.endswith("weight")
    return Place(PREFIXES["vae"] + renamed, convolution=linear)


def _clip(name: str, names: list[str]) -> Place:
    return Place(_CLIP + name)


def _open_clip(name: str, names: list[str]) -> Place:
    renamed = OPEN_CLIP + _renamed(name, _TEXT)
    if found := re.fullmatch(r"(.*\.attn\.)([qkv])_proj\.(weight|bias)", renamed):
        return Place(f"{found[1]}in_proj_{found[3]}", third="qkv".index(found[2]))
    return Place(renamed)


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for pattern, new in table.items():
        name = re.sub(pattern, new, name)
    return name


def _count(names: list[str], pattern: str) -> int:
    """Returns how many numbers `pattern` has in `names`, from 0."""
    return 1 + max((int(found[1]) for name in names if (found := re.match(pattern, name))), default=0)


class PartOfFile(FileTensors):
    """The tensors of one part of a single file, under the names of diffusers and transformers.

    A tensor that the part's network does not have keeps the file's name, so that it is reported.

    Args:
      file: the whole file.
      where: name -> `Place` of each tensor that the network has.
      prefix: of the part in the file.
    """

    def __init__(self, file: FileTensors, where: Mapping[str, Place], prefix: str):
        self._file = file
        self._where = {name: place for name, place in where.items() if place.name in file}
        used = {place.name for place in where.values()}
        unknown = [name for name in file if name.startswith(prefix) and name not in used and not _UNREAD.fullmatch(name)]
        self._where |= {name: Place(name) for name in unknown}
        super().__init__({name: self._shape(place) for name, place in self._where.items()})

    def _shape(self, place: Place) -> tuple[int, ...]:
        shape = self._file.shape(place.name)
        if place.convolution and shape[2:] == (1, 1):
            shape = shape[:2]
        return shape if place.third is None else (shape[0] // 3, *shape[1:])

    def __getitem__(self, name: str) -> np.ndarray:
        place = self._where[name]
        array = self._file[place.name]
        if place.third is not None:
            array = np.split(array, 3)[place.third]
        return array.reshape(self.shape(name))


def in_file(where: Mapping[str, Place], tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns a part's `tensors` as a file keeps them: the inverse of `PartOfFile`."""
    thirds: dict[str, dict[int, np.ndarray]] = {}
    arrays = {}
    for name, place in where.items():
        array = tensors[name]
        if place.third is not None:
            thirds.setdefault(place.name, {})[place.third] = array
        else:
            arrays[place.name] = array[:, :, None, None] if place.convolution and array.ndim == 2 else array
    return arrays | {name: np.concatenate([parts[third] for third in range(3)]) for name, parts in thirds.items()}
