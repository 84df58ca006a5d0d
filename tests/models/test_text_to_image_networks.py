"""UNet, VAE and text encoder: what diffusers and transformers give, recorded; full-size shapes; precision; refused options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrack_jax.checkpoints.stable_diffusion import prompt_embeddings
from retrack_jax.checks import UserError
from retrack_jax.models.clip_text import ClipTextEncoder
from retrack_jax.models.transformer2d import Transformer2DModel
from retrack_jax.models.unet2d_condition import UNet2DCondition
from retrack_jax.models.vae import AutoencoderKL
from tests.prompts200 import PROMPTS

SD14_UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.2.2",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SD21_UNET = {
    **SD14_UNET,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
XL_UNET = {
    **{name: value for name, value in SD21_UNET.items() if name != "upcast_attention"},
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
}
SD_VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SD14_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "vocab_size": 49408,
}


def relative(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def count(module, *inputs) -> int:
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))


@pytest.fixture(scope="module")
def apply_unet(pipeline):
    return jax.jit(pipeline.unet.apply)


def test_text_encoder(pipeline, recorded_sd):
    found = prompt_embeddings(pipeline, [PROMPTS[index] for index in recorded_sd["chosen"]])
    assert found.dtype == jnp.float32
    assert relative(found, recorded_sd["text"]) < 1e-5


def test_unet(pipeline, recorded_sd, apply_unet):
    found = apply_unet({"params": pipeline.unet_params}, recorded_sd["latents"], recorded_sd["t"], recorded_sd["text"][1:])
    assert relative(found, recorded_sd["unet"]) < 1e-5


def test_unet_gives_one_prompt_to_all_images(pipeline, recorded_sd, apply_unet):
    one = recorded_sd["text"][1:2]
    args = {"params": pipeline.unet_params}, recorded_sd["latents"], recorded_sd["t"]
    np.testing.assert_allclose(apply_unet(*args, one), apply_unet(*args, np.concatenate([one, one])), atol=1e-6)


def test_vae(pipeline, recorded_sd):
    params = {"params": pipeline.vae_params}
    x = recorded_sd["picture"][None].astype(np.float32) / np.float32(127.5) - 1
    mean, std = jax.jit(lambda params, x: pipeline.vae.apply(params, x, method="encode"))(params, x)
    assert relative(mean, recorded_sd["mean"]) < 1e-5 and relative(std, recorded_sd["std"]) < 1e-5
    assert (np.asarray(std) > 0).all()
    decoded = jax.jit(lambda params, z: pipeline.vae.apply(params, z, method="decode"))(params, recorded_sd["latents"])
    assert relative(decoded, recorded_sd["decoded"]) < 1e-5


@pytest.mark.parametrize(("config", "parameters"), [(SD14_UNET, 859_520_964), (SD21_UNET, 865_910_724), (XL_UNET, 2_567_463_684)])
def test_full_size_unet_has_the_published_number_of_parameters(config, parameters):
    unet = UNet2DCondition.from_config(config)
    inputs = jnp.zeros((1, 64, 64, 4)), jnp.zeros((1,), jnp.int32), unet.smallest_condition
    output, variables = jax.eval_shape(lambda *inputs: unet.init_with_output(jax.random.key(0), *inputs), *inputs)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters
    assert output.shape == (1, 64, 64, 4) and output.dtype == jnp.float32


def test_full_size_vae_and_text_encoder_have_the_published_number_of_parameters():
    vae = AutoencoderKL.from_config(SD_VAE)
    assert vae.downscale == 8 and vae.scaling_factor == 0.18215
    assert count(vae, jnp.zeros((1, 64, 64, 3))) == 83_653_863
    assert count(ClipTextEncoder.from_config(SD14_TEXT), jnp.zeros((1, 77), jnp.int32)) == 123_060_480


def test_bfloat16_parameters_and_compute(pipeline, recorded_sd):
    """As close as 8 bits allow; the result is float32 all the same."""
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), pipeline.unet_params)
    module = pipeline.unet.clone(dtype=jnp.bfloat16)
    found = jax.jit(module.apply)({"params": half}, recorded_sd["latents"], recorded_sd["t"], recorded_sd["text"][1:])
    assert found.dtype == jnp.float32
    assert 1e-4 < relative(found, recorded_sd["unet"]) < 0.05


def test_remat_computes_again_and_changes_no_gradient():
    x, prompt = jnp.linspace(-1, 1, 64).reshape(1, 4, 4, 4), jnp.ones((1, 3, 4))
    params = jax.jit(Transformer2DModel(2, norm_num_groups=2).init)(jax.random.key(0), x, prompt)["params"]

    def gradient(remat):
        module = Transformer2DModel(2, norm_num_groups=2, remat=remat)
        fn = jax.grad(lambda params: jnp.square(module.apply({"params": params}, x, prompt)).sum())
        return jax.jit(fn)(params), str(jax.make_jaxpr(fn)(params)).count("remat")

    (plain, none), (again, some) = gradient(False), gradient(True)
    assert none == 0 and some > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, again)


def test_remat_reaches_every_block_of_the_unet(pipeline, recorded_sd):
    def remats(module):
        args = pipeline.unet_params, recorded_sd["latents"], recorded_sd["t"], recorded_sd["text"][1:]
        return str(jax.make_jaxpr(lambda params, *rest: module.apply({"params": params}, *rest))(*args)).count("remat")

    # one for each of 7 residual and 4 transformer blocks
    assert remats(pipeline.unet) == 0 and remats(pipeline.unet.clone(remat=True)) >= 11


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"addition_embed_type": "image"}, "choose one of None, text_time"),
        ({"addition_embed_type": "text_time"}, "addition_time_embed_dim"),
        (
            {"addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 1536},
            "projection_class_embeddings_input_dim",
        ),
        ({"transformer_layers_per_block": [1, 1, 2, [1, 2]]}, "transformer_layers_per_block is .*whole number"),
        ({"reverse_transformer_layers_per_block": [1, 2]}, "reverse_transformer_layers_per_block has 2 entries"),
        ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep'; only null"),
        ({"num_attention_heads": 8}, "num_attention_heads"),
        ({"crossattention_dim": 5}, "did you mean 'cross_attention_dim'"),
        ({"down_block_types": ["DownBlock2D"]}, "down_block_types has 1 entries"),
        ({"down_block_types": ["AttnDownBlock2D"] * 4}, "AttnDownBlock2D"),
        ({"attention_head_dim": 7}, "number of heads here and must divide"),
        ({"attention_head_dim": [5, 10]}, "attention_head_dim has 2 entries"),
        ({"_class_name": "UNet2DModel"}, "only UNet2DConditionModel"),
    ],
)
def test_refused_unet_options(change, message):
    with pytest.raises(UserError, match=message):
        UNet2DCondition.from_config({**SD14_UNET, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shift_factor": "0.1"}, "shift_factor is '0.1'; it must be a number"),
        ({"latents_mean": [0.1]}, "latents_mean is .0.1,. and its latents_std is None; each must have a number for"),
        ({"latents_mean": [0.1] * 4, "latents_std": [1.0] * 3}, "latents_std is .1.0, 1.0, 1.0.; each must"),
        ({"latents_mean": [0.1] * 4, "latents_std": [0.0] * 4}, "latents_std is .0.0, 0.0"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, "AttnDownEncoderBlock2D"),
        ({"norm_num_groups": 30}, "must divide 128"),
        ({"_class_name": "AutoencoderTiny"}, "only AutoencoderKL"),
    ],
)
def test_refused_vae_options(change, message):
    with pytest.raises(UserError, match=message):
        AutoencoderKL.from_config({**SD_VAE, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "choose one of quick_gelu, gelu"),
        ({"num_attention_heads": 7}, "7 heads"),
        ({"model_type": "t5"}, "t5"),
    ],
)
def test_refused_text_encoder_options(change, message):
    with pytest.raises(UserError, match=message):
        ClipTextEncoder.from_config({**SD14_TEXT, **change})


def test_the_sizes_of_xl_must_fit():
    unet = UNet2DCondition.from_config(XL_UNET)
    inputs = jnp.zeros((1, 8, 8, 4)), jnp.zeros((1,), jnp.int32)
    for name, width in (("text_embeds", 768), ("time_ids", 5)):
        condition = {**unet.smallest_condition, name: jnp.zeros((1, width))}
        with pytest.raises(UserError, match="text_embeds and time_ids have shapes"):
            jax.eval_shape(unet.init, jax.random.key(0), *inputs, condition)


def test_shapes_that_do_not_fit(pipeline, recorded_sd):
    params = {"params": pipeline.unet_params}
    x, t, text = recorded_sd["latents"], recorded_sd["t"], recorded_sd["text"][1:]
    with pytest.raises(UserError, match="take UNet and text encoder from one checkpoint"):
        pipeline.unet.apply(params, x, t, text[..., :8])
    with pytest.raises(UserError, match="multiples of 2"):
        pipeline.unet.apply(params, x[:, :7], t, text)
    with pytest.raises(UserError, match="needs multiples of 4"):
        pipeline.vae.apply({"params": pipeline.vae_params}, jnp.zeros((1, 30, 32, 3)), method="encode")
