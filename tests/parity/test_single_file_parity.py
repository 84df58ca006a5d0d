"""Names and layouts of single files against diffusers' own conversion: parts of random shapes, and XL's of full size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from diffusers.loaders import single_file_utils  # noqa: E402

from retrack_jax.checkpoints import export_pipeline, export_single_file, load_pipeline  # noqa: E402
from retrack_jax.models.clip_text import ClipTextEncoder  # noqa: E402
from retrack_jax.models.unet2d_condition import UNet2DCondition  # noqa: E402
from retrack_jax.models.vae import AutoencoderKL  # noqa: E402
from retrack_jax.weights.ldm_names import SD1, SD2, XL, in_file  # noqa: E402
from retrack_jax.weights.names import param_shapes, torch_shapes  # noqa: E402
from retrack_jax.weights.safetensors_io import SafetensorsFile  # noqa: E402
from tests.models.test_text_to_image_networks import SD14_TEXT, SD_VAE, XL_UNET  # noqa: E402
from tests.parity.test_sd_parity import plain, shaken, vae_options, weights  # noqa: E402
from tests.parity.test_xl_parity import unet_options  # noqa: E402
from tests.tiny_xl import write_xl  # noqa: E402

torch.set_num_threads(1)
BIG_G = {
    "hidden_act": "gelu", "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32,
    "projection_dim": 1280, "vocab_size": 49408,
}  # fmt: skip


def clip(name: str) -> str:
    return name.removeprefix("text_model.")


def converted(layout, part: str, stored: dict, theirs) -> dict:
    """Returns what diffusers makes of the file `stored` for its network `theirs`."""
    if part == "unet":
        return single_file_utils.convert_ldm_unet_checkpoint(stored, theirs.config)
    if part == "vae":
        return single_file_utils.convert_ldm_vae_checkpoint(stored, theirs.config)
    if part == "text_encoder" and layout is not SD2:
        return single_file_utils.convert_ldm_clip_checkpoint(stored)
    return single_file_utils.convert_open_clip_checkpoint(theirs, stored, prefix=f"{layout.parts[part].prefix}model.")


def random_network(part: str, seed: int):
    numbers = np.random.default_rng(seed)
    if part == "unet":
        return diffusers.UNet2DConditionModel(**unet_options(seed)[0])
    if part == "vae":
        channels = (8, 16, 16, 32)[: 2 + seed % 3]
        return diffusers.AutoencoderKL(**vae_options(*channels, norm_num_groups=4, layers_per_block=1 + seed % 2))
    heads = int(numbers.choice([1, 2, 4]))
    sizes = {"vocab_size": 99, "hidden_size": heads * int(numbers.integers(4, 9)), "num_attention_heads": heads}
    sizes |= {"intermediate_size": int(numbers.integers(20, 50)), "num_hidden_layers": 1 + seed % 4}
    config = transformers.CLIPTextConfig(**sizes, projection_dim=int(numbers.integers(5, 20)))
    return (transformers.CLIPTextModel if part == "text_encoder" else transformers.CLIPTextModelWithProjection)(config)


PARTS = [(XL, part) for part in XL.parts] + [(SD1, "text_encoder"), (SD2, "text_encoder")]  # the others are the same in all


@pytest.mark.parametrize(("layout", "part"), PARTS)
@pytest.mark.parametrize("seed", range(6))
def test_diffusers_converts_what_we_write(layout, part, seed):
    torch.manual_seed(seed)
    theirs = shaken(random_network(part, seed))
    expected = {clip(name): value for name, value in weights(theirs).items()}
    stored = {name: torch.tensor(np.ascontiguousarray(value)) for name, value in in_file(layout.parts[part], expected).items()}
    found = {clip(name): value.numpy() for name, value in converted(layout, part, stored, theirs).items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def full_size() -> dict:
    """Part -> our network of the published base model, the smallest inputs, and diffusers' one without memory."""
    unet, ids = UNet2DCondition.from_config(XL_UNET), jnp.zeros((1, 77), jnp.int32)
    second = ClipTextEncoder.from_config(BIG_G, projection_dim=1280)
    inputs = jnp.zeros((1, 64, 64, 4)), jnp.zeros((1,), jnp.int32), unet.smallest_condition
    clips = [transformers.CLIPTextConfig(**config) for config in (SD14_TEXT, BIG_G)]
    with torch.device("meta"):
        return {
            "unet": (unet, inputs, diffusers.UNet2DConditionModel.from_config(XL_UNET)),
            "vae": (AutoencoderKL.from_config(SD_VAE), (jnp.zeros((1, 64, 64, 3)),), diffusers.AutoencoderKL.from_config(SD_VAE)),
            "text_encoder": (ClipTextEncoder.from_config(SD14_TEXT), (ids,), transformers.CLIPTextModel(clips[0])),
            "text_encoder_2": (second, (ids,), transformers.CLIPTextModelWithProjection(clips[1])),
        }


def test_the_published_base_model_tensor_by_tensor():
    """The published file has 2,515 tensors: these, a buffer of positions, and the logit_scale of OpenCLIP."""
    counts = {"unet": 1680, "vae": 248, "text_encoder": 196, "text_encoder_2": 389}
    for part, (ours, inputs, theirs) in full_size().items():
        shapes = torch_shapes(param_shapes(ours, *inputs))
        stored = in_file(XL.parts[part], {name: np.broadcast_to(np.int8(0), shape) for name, shape in shapes.items()})
        assert len(stored) == counts[part]
        stored = {name: torch.empty(value.shape, device="meta") for name, value in stored.items()}
        found = {clip(name): tuple(value.shape) for name, value in converted(XL, part, stored, theirs).items()}
        expected = {clip(name): tuple(value.shape) for name, value in theirs.state_dict().items()}
        assert found == expected == shapes
    assert sum(counts.values()) + 2 == 2515


def test_diffusers_reads_our_xl_file(tmp_path):
    """`from_single_file`, with the configs of a folder and no network, gives the pipeline of that folder; and back again."""
    source = write_xl(tmp_path / "source")
    pipeline = load_pipeline(source)
    changed = jax.tree.map(lambda leaf: leaf + 1, pipeline.unet_params)
    export_single_file(tmp_path / "one", pipeline, changed)
    export_pipeline(tmp_path / "folder", pipeline, changed)
    file = tmp_path / "one" / "model.safetensors"
    one = diffusers.StableDiffusionXLPipeline.from_single_file(str(file), config=str(source), local_files_only=True)
    folder = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "folder")
    for part in XL.parts:
        theirs, ours = (weights(getattr(each, part)) for each in (folder, one))
        assert theirs.keys() == ours.keys()
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert plain(one.scheduler.config) == plain(folder.scheduler.config)
    assert one.config.force_zeros_for_empty_prompt and one.vae.config.scaling_factor == 0.13025 and one.vae.config.force_upcast
    # As diffusers saves what it has read, the folder is ours again; nothing has moved by a bit.
    one.save_pretrained(tmp_path / "again")
    back = load_pipeline(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, back.unet_params, changed)
    for ours, theirs in zip(back.text_encoders, pipeline.text_encoders, strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    export_single_file(tmp_path / "two", back, back.unet_params)
    first, second = SafetensorsFile(file), SafetensorsFile(tmp_path / "two" / "model.safetensors")
    assert set(first) == set(second)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
