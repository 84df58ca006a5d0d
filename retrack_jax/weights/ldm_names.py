"""The names that single files of weights give the tensors of Stable Diffusion: CompVis' ldm for 1.x and 2.x, sgm for XL.

One file holds the UNet, the VAE and the text encoders, each behind its prefix: the layouts `SD1`, `SD2` and `XL`. `places` says
where the file keeps each tensor that diffusers and transformers name; some have another shape there, which `Place` describes.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from retrack_jax.weights.file_tensors import FileTensors

# Tensors of text encoders that are not read: buffers, and what Stable Diffusion does not use. XL uses the projection: it is read.
_UNREAD = r".*(position_ids|attn_mask|logit_scale|text_projection)(\.weight)?"

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
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
    r"mlp\.fc1": "mlp.c_fc", r"mlp\.fc2": "mlp.c_proj", r"self_attn": "attn", r"text_projection\.weight": "text_projection",
}  # fmt: skip


class Place(NamedTuple):
    """Where a file keeps a tensor.

    Attributes:
      name: of the tensor in the file.
      convolution: whether the file has a linear layer `[out, in]` as a convolution `[out, in, 1, 1]`: the VAE's attention.
      third: which third of the rows it is, if query, key and value are one tensor: OpenCLIP's attention.
      transposed: whether the file has a linear layer `[out, in]` as `[in, out]`: OpenCLIP's projection.
    """

    name: str
    convolution: bool = False
    third: int | None = None
    transposed: bool = False


def _unet(names: list[str]) -> dict[str, Place]:
    layers = _count(names, r"down_blocks\.0\.resnets\.(\d+)\.")
    attending = {found[1] for name in names if (found := re.match(r"up_blocks\.(\d+)\.attentions\.", name))}
    return {name: Place(_unet_name(name, layers, attending)) for name in names}


def _unet_name(name: str, layers: int, attending: set[str]) -> str:
    """Returns ldm's name; blocks have `layers` layers each, and the up blocks `attending` have attention."""
    module, _, leaf = name.rpartition(".")
    if module in _UNET_ENDS:
        return f"{_UNET_ENDS[module]}.{leaf}"
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        kind, index, rest = found.groups()
        block = f"middle_block.{2 * int(index) + (kind == 'attentions')}"
    else:
        side, number, kind, index, rest = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name).groups()
        slot = int(kind == "attentions")
        if kind == "upsamplers":
            index, slot = layers, 1 + (number in attending)
        elif kind == "downsamplers":
            index, rest = layers, rest.replace("conv", "op")
        start = int(number) * (layers + 1) + int(index)
        block = f"input_blocks.{1 + start}.{slot}" if side == "down" else f"output_blocks.{start}.{slot}"
    if kind == "resnets":
        layer, _, rest = rest.rpartition(".")
        rest = f"{_UNET_RESNET[layer]}.{rest}"
    return f"{block}.{rest}"


def _vae(names: list[str]) -> dict[str, Place]:
    last = _count(names, r"decoder\.up_blocks\.(\d+)\.") - 1

    def place(name: str) -> Place:
        renamed = re.sub(r"\bup_blocks\.(\d+)", lambda found: f"up.{last - int(found[1])}", _renamed(name, _VAE))
        return Place(renamed, convolution="attentions" in name and "norm" not in name and name.endswith("weight"))

    return {name: place(name) for name in names}


def _clip(names: list[str]) -> dict[str, Place]:
    return {name: Place(f"transformer.text_model.{name}") for name in names}


def _open_clip(names: list[str]) -> dict[str, Place]:
    return {name: _open_clip_place(name) for name in names}


def _open_clip_place(name: str) -> Place:
    renamed = "model." + _renamed(name, _TEXT)
    if found := re.fullmatch(r"(.*\.attn\.)([qkv])_proj\.(weight|bias)", renamed):
        return Place(f"{found[1]}in_proj_{found[3]}", third="qkv".index(found[2]))
    return Place(renamed, transposed=name == "text_projection.weight")


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for pattern, new in table.items():
        name = re.sub(pattern, new, name)
    return name


def _count(names: list[str], pattern: str) -> int:
    """Returns how many numbers `pattern` has in `names`, from 0."""
    return 1 + max((int(found[1]) for name in names if (found := re.match(pattern, name))), default=0)


class Part(NamedTuple):
    """How a file keeps one part of a model.

    Attributes:
      prefix: what the names of all its tensors begin with.
      places: from all names that diffusers or transformers give the tensors of the part to the `Place` of each, whose name lacks
        the prefix.
      unread: a regular expression of the names, without the prefix, that no network needs.
    """

    prefix: str
    places: Callable[[list[str]], dict[str, Place]]
    unread: str = "(?!)"  # none


class Layout(NamedTuple):
    """One kind of single file.

    Attributes:
      name: of the model.
      parts: by the names of diffusers' folders; the text encoders are last.
      configs: the model on the hub whose configs fit any such file; empty: there are several with different ones.
    """

    name: str
    parts: Mapping[str, Part]
    configs: str

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The names of the text encoders."""
        return tuple(self.parts)[2:]


_IMAGE = {"unet": Part("model.diffusion_model.", _unet), "vae": Part("first_stage_model.", _vae)}
# Stable Diffusion 2.x uses the states before OpenCLIP's last layer, and folders of it do not have that layer.
_OF_OPEN_CLIP_2 = rf"{_UNREAD}|.*resblocks\.23\..*"
SD1 = Layout(
    "Stable Diffusion 1.x",
    {**_IMAGE, "text_encoder": Part("cond_stage_model.", _clip, _UNREAD)},
    configs="stable-diffusion-v1-5/stable-diffusion-v1-5",
)
SD2 = Layout(
    "Stable Diffusion 2.x",
    {**_IMAGE, "text_encoder": Part("cond_stage_model.", _open_clip, _OF_OPEN_CLIP_2)},
    configs="",
)
XL = Layout(
    "Stable Diffusion XL",
    {
        **_IMAGE,
        "text_encoder": Part("conditioner.embedders.0.", _clip, _UNREAD),
        "text_encoder_2": Part("conditioner.embedders.1.", _open_clip, _UNREAD),
    },
    configs="stabilityai/stable-diffusion-xl-base-1.0",
)


def places(part: Part, names: Iterable[str]) -> dict[str, Place]:
    """Returns where a file keeps the tensors `names`, all of a part, as diffusers or transformers name them.

    Names of text encoders are without transformers' leading `text_model.`.
    """
    where = part.places(list(names))
    return {name: place._replace(name=part.prefix + place.name) for name, place in where.items()}


class PartOfFile(FileTensors):
    """The tensors of one part of a single file, under the names of diffusers and transformers.

    A tensor that the part's network does not have keeps the file's name, so that it is reported.

    Args:
      file: the whole file.
      part: which part.
      names: the tensors that the network has.
    """

    def __init__(self, file: FileTensors, part: Part, names: Iterable[str]):
        where = {name: _as_in(file, place) for name, place in places(part, names).items()}
        used = {place.name for place in where.values()}
        behind = [name for name in file if name.startswith(part.prefix) and name not in used]
        unknown = [name for name in behind if not re.fullmatch(part.unread, name.removeprefix(part.prefix))]
        self._file = file
        self._where = {name: place for name, place in where.items() if place.name in file}
        self._where |= {name: Place(name) for name in unknown}
        super().__init__({name: self._shape(place) for name, place in self._where.items()})

    def _shape(self, place: Place) -> tuple[int, ...]:
        shape = self._file.shape(place.name)
        if place.convolution and shape[2:] == (1, 1):
            return shape[:2]
        if place.third is not None and shape and shape[0] % 3 == 0:
            return shape[0] // 3, *shape[1:]
        return shape[::-1] if place.transposed else shape

    def __getitem__(self, name: str) -> np.ndarray:
        place = self._where[name]
        array = self._file[place.name]
        if place.third is not None:
            array = np.split(array, 3)[place.third]
        return array.T if place.transposed else array.reshape(self.shape(name))


def _as_in(file: FileTensors, place: Place) -> Place:
    """Returns `place`, or where diffusers' scripts before 2024 put a projection: under `.weight`, not transposed."""
    early = f"{place.name}.weight"
    return Place(early) if place.transposed and place.name not in file and early in file else place


def in_file(part: Part, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns a part's `tensors` as a file keeps them: the inverse of `PartOfFile`."""
    thirds: dict[str, dict[int, np.ndarray]] = {}
    arrays = {}
    for name, place in places(part, tensors).items():
        array = tensors[name]
        if place.third is not None:
            thirds.setdefault(place.name, {})[place.third] = array
        elif place.transposed:
            arrays[place.name] = array.T
        else:
            arrays[place.name] = array[:, :, None, None] if place.convolution and array.ndim == 2 else array
    return arrays | {name: np.concatenate([parts[third] for third in range(3)]) for name, parts in thirds.items()}
