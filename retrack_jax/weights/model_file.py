"""A whole text-to-image model in one file: opened, and which model it is, told by the names and shapes of its tensors."""

import re
from pathlib import Path

from retrack_jax.checks import UserError, check
from retrack_jax.weights.file_tensors import FileTensors, Unwrapped
from retrack_jax.weights.folder import open_file
from retrack_jax.weights.ldm_names import SD1, SD2, XL, Layout

IS_AN_ADAPTER = (
    "is an adapter (LoRA), which changes a model and is none; merge it into its model (in diffusers: "
    "load_lora_weights, fuse_lora, save_pretrained) and give that folder"
)
# A tensor that tells what is not read -> what the file is then, and what to do.
_INSTEAD = "is not supported; give Stable Diffusion 1.x, 2.x or XL"
_OTHERS = {
    r".*(lora_|\.lora\.).*": IS_AN_ADAPTER,
    r"conditioner\.embedders\.0\.model\..*": "holds Stable Diffusion XL's refiner, which is not supported; give the base model",
    r"(.*\.)?joint_blocks\..*": "holds Stable Diffusion 3, which is read only as a folder that diffusers saved; give that",
    r"(.*\.)?double_blocks\..*": f"holds FLUX, which {_INSTEAD}",
    r"control_model\..*": f"holds a ControlNet, which {_INSTEAD}",
    r"edm_(mean|std|vpred\..*)": "holds a model of EDM's sigmas (Playground 2.5, CosXL), which is read only as a folder "
    "that diffusers saved; give that",
}
_UNET, _SIZES = "model.diffusion_model.", "model.diffusion_model.label_emb."
_INPUT, _OUTPUT = f"{_UNET}input_blocks.0.0.weight", f"{_UNET}out.2.weight"
_BY_CHANNELS = {5: "a depth", 7: "an upscaling", 8: "an InstructPix2Pix", 9: "an inpainting"}


def open_model_file(path: Path) -> tuple[FileTensors, Layout]:
    """Returns the tensors of the file at `path`, without the level `state_dict` of training scripts, and how they are laid out.

    Raises:
      UserError: the file is damaged, lacks a part, or holds something else; the message names what.
    """
    tensors = Unwrapped(open_file(path), "state_dict.")
    for pattern, what in _OTHERS.items():
        check(not any(re.fullmatch(pattern, name) for name in tensors), f"{path} {what}")

    def holds(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in tensors)

    layout = XL if holds("conditioner.") else SD2 if holds("cond_stage_model.model.") else SD1
    lacking = [f"{part.prefix}*" for part in layout.parts.values() if not holds(part.prefix)]
    if lacking:
        what = f"{path} is no whole {'Stable Diffusion' if layout is SD1 else layout.name} in one file"
        raise UserError(f"{what}: it has no {' and '.join(lacking)}; give one that has all parts")
    known = tuple(part.prefix for part in layout.parts.values())
    strange = [name for name in tensors if name.startswith(("conditioner.", "cond_stage_model.")) and not name.startswith(known)]
    if strange:
        raise UserError(f"{path} holds {layout.name}, and of another model {strange[0]}; give a file of one model")
    takes, gives = (tensors.shape(name) if name in tensors else () for name in (_INPUT, _OUTPUT))
    if len(takes) == len(gives) == 4 and takes[1] != gives[0]:
        kind = _BY_CHANNELS.get(takes[1], "another kind of")
        what = f"{path} holds {kind} model, whose UNet takes {takes[1]} channels and gives {gives[0]}"
        raise UserError(f"{what}; it is not supported: give the model that it was made from")
    check(
        holds(_SIZES) == (layout is XL),
        f"{path}: the text encoders are those of {layout.name}, and the UNet has {'' if holds(_SIZES) else 'no '}{_SIZES}*, "
        "the input for sizes that Stable Diffusion XL's has; give a file of one model",
    )
    return tensors, layout
