"""The networks that are measured, as diffusers configs that both sides read."""

from typing import Any

_COMMON = {"_class_name": "UNet2DModel", "act_fn": "silu", "norm_num_groups": 32, "norm_eps": 1e-6}


def _unet(size: int, channels: int, widths: tuple[int, ...], attention: tuple[int, ...], **more) -> dict[str, Any]:
    """A UNet with attention at the levels in `attention`, on the way down and on the way up."""
    levels = range(len(widths))
    return _COMMON | {
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": list(widths),
        "down_block_types": ["AttnDownBlock2D" if i in attention else "DownBlock2D" for i in levels],
        "up_block_types": ["AttnUpBlock2D" if i in attention else "UpBlock2D" for i in reversed(levels)],
        **more,
    }


# google/ddpm-cifar10-32 and google/ddpm-ema-celebahq-256, config.json; digits: the embedded 8 x 8 images.
NETWORKS = {
    "digits": _unet(8, 1, (32, 64), (1,), layers_per_block=1, attention_head_dim=8),
    "cifar10": _unet(
        32, 3, (128, 256, 256, 256), (1,), layers_per_block=2, attention_head_dim=None,
        downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
    ),
    "celebahq": _unet(
        256, 3, (128, 128, 256, 256, 512, 512), (4,), layers_per_block=2, attention_head_dim=None,
        downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
    ),
}  # fmt: skip

# The images in the remain and in the forget batch of one step; lambda and learning rate of the official recipes.
BATCH = {"digits": (64, 64), "mnist5k_tshirt": (128, 128), "cifar10": (8, 8), "celebahq": (1, 1)}
RECIPE = {
    "digits": (0.005, 1e-4), "digits_tshirt": (0.005, 1e-4), "mnist_tshirt": (0.005, 1e-4), "mnist5k_tshirt": (0.005, 5e-5),
    "cifar10": (0.02, 2e-5), "celebahq": (0.005, 5e-6), "stable_diffusion": (0.5, 1e-5),
}  # fmt: skip
# The paper's number of neighbors, and SISS's rescale factor.
NUM_NEIGHBORS = 10
SISS_SCALE = {"digits": 5.0, "mnist_tshirt": 5.0, "mnist5k_tshirt": 5.0, "cifar10": 5.0, "celebahq": 500.0}


def config_of(name: str) -> dict[str, Any]:
    """Returns the diffusers config of a network above, of Stable Diffusion's, or of the one that `configs/NAME.py` describes."""
    if name in NETWORKS:
        return NETWORKS[name]
    from dataclasses import asdict

    from tests.benchmarks.programs import options_of
    from tests.models.test_text_to_image_networks import SD14_UNET

    return SD14_UNET if name == "stable_diffusion" else asdict(options_of(name).model)
