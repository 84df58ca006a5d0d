"""UNet2D against recorded outputs of diffusers, and what the recordings cannot show: refusals, dropout, remat, bfloat16, its
layers.

Parity over many more configs, live, is in tests/parity/test_unet2d_parity.py.
"""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from retrack_jax.checkpoints import import_diffusers
from retrack_jax.checks import UserError
from retrack_jax.models.attention import Attention, GroupNorm
from retrack_jax.models.blocks import AttentionOptions, DownBlock2D
from retrack_jax.models.embeddings import silu, timestep_embedding
from retrack_jax.models.resnet import ResnetBlock2D, ResnetOptions, downsample_mean, upsample_nearest
from retrack_jax.models.unet2d import UNet2D

DATA = Path(__file__).parents[1] / "fixtures" / "diffusers"
FIXTURES = ("safetensors", "old_pipeline", "sharded_pipeline/unet", "averaged/unet_ema", "float16", "bfloat16")
TINY = dict(
    in_channels=1,
    out_channels=1,
    block_out_channels=(4, 8),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=2,
    layers_per_block=1,
)
CIFAR10 = dict(
    sample_size=32,
    block_out_channels=(128, 256, 256, 256),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=None,
)
CELEBAHQ = dict(
    sample_size=256,
    block_out_channels=(128, 128, 256, 256, 512, 512),
    down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
    attention_head_dim=None,
)


def relative(a, b):
    """‖a - b‖ / ‖b‖."""
    return float(
        np.linalg.norm(np.asarray(a, np.float64) - np.asarray(b, np.float64)) / np.linalg.norm(np.asarray(b, np.float64))
    )


@jax.jit
def apply_tiny(params, x_t, t):
    """The network without dropout, compiled once for all tests."""
    return UNet2D(**TINY).apply({"params": params}, x_t, t)


@pytest.fixture(scope="module")
def tiny():
    """A small network with dropout, its parameters and a batch."""
    module = UNet2D(**TINY, dropout=0.5)
    x_t, t = jax.random.normal(jax.random.key(1), (2, 4, 8, 1)), jnp.asarray([3, 900])
    return module, jax.jit(module.init)(jax.random.key(0), x_t, t)["params"], x_t, t


@pytest.mark.parametrize("name", FIXTURES)
def test_equals_diffusers_at_the_recorded_timesteps(name):
    module, params = import_diffusers(DATA / name)
    io = np.load(DATA / name / "io.npz")
    y = jax.jit(module.apply)({"params": params}, jnp.asarray(io["x_t"]), jnp.asarray(io["t"]))
    assert y.dtype == jnp.float32
    for ours, theirs in zip(y, io["y"], strict=True):
        assert relative(ours, theirs) <= 1e-5


# The sizes of diffusers' own models, which the parity test checks against the real ones.
@pytest.mark.parametrize(("config", "count"), [(CIFAR10, 35_746_307), (CELEBAHQ, 113_673_219)])
def test_parameter_count_of_the_ddpm_models(config, count):
    module = UNet2D(**config)
    x_t = jnp.zeros((1, 32, 32, 3))
    shapes = jax.eval_shape(module.init, jax.random.key(0), x_t, jnp.zeros((1,), jnp.int32))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_config_round_trip_keeps_every_option():
    module = UNet2D(
        **TINY,
        sample_size=(8, 16),
        attention_head_dim=None,
        attn_norm_num_groups=4,
        mid_block_scale_factor=1.5,
        time_embedding_type="learned",
        num_train_timesteps=10,
        downsample_type="resnet",
    )
    assert UNet2D.from_config(module.to_config()) == module
    assert UNet2D.from_config(module.to_config(), remat=True, dtype=jnp.bfloat16) == module.clone(remat=True, dtype=jnp.bfloat16)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"class_embed_type": "projection"}, "class_embed_type is 'projection'; choose one of None, timestep, identity"),
        ({"num_class_embeds": 0}, "num_class_embeds is 0"),
        ({"norm_num_group": 2}, "did you mean 'norm_num_groups'"),
        ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel"),
        ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, "SkipDownBlock2D"),
        ({"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}, "CrossAttnUpBlock2D"),
        ({"up_block_types": ["UpBlock2D"]}, "up_block_types has 1 entries"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type"),
        ({"downsample_type": "fir"}, "downsample_type"),
        ({"resnet_time_scale_shift": "ada_group"}, "ada_group"),
        ({"time_embedding_type": "cosine"}, "time_embedding_type"),
        ({"time_embedding_type": "learned"}, "num_train_timesteps"),
        ({"act_fn": "tanh"}, "act_fn"),
        ({"norm_num_groups": 3}, "norm_num_groups"),
        ({"norm_num_groups": None}, "norm_num_groups"),
        ({"attn_norm_num_groups": 3}, "attn_norm_num_groups"),
        ({"attention_head_dim": 16}, "attention_head_dim"),
    ],
)
def test_refuses_by_name_what_it_cannot_do(options, words):
    with pytest.raises(UserError, match=words):
        UNet2D.from_config(TINY | options)


def test_passes_over_the_keys_of_an_average_and_private_ones():
    extra = {"decay": 0.99, "power": 0.75, "use_ema_warmup": True, "_diffusers_version": "0.1.1", "class_embed_type": None}
    assert UNet2D.from_config(TINY | extra) == UNet2D(**TINY)


def test_absent_keys_take_the_defaults_of_the_version_that_wrote_the_config():
    first = {"_diffusers_version": "0.0.4", "block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4}
    module = UNet2D.from_config(first)
    assert module == UNet2D(block_out_channels=(8, 8, 8, 8), norm_num_groups=4)
    assert (module.attention_head_dim, module.downsample_padding, module.flip_sin_to_cos) == (8, 1, True)
    assert UNet2D.from_config(first | {"attention_head_dim": None}).attention_head_dim is None  # one head
    shifting = TINY | {"resnet_time_scale_shift": "scale_shift", "down_block_types": ["DownBlock2D", "DownBlock2D"]}
    for version, groups in (("0.16.1", 2), ("0.17.0", None), ("0.40.0.dev0", None), (None, None)):
        assert UNet2D.from_config(shifting | {"_diffusers_version": version}).attn_norm_num_groups == groups, version
    assert UNet2D.from_config(shifting | {"_diffusers_version": "0.16.1", "attn_norm_num_groups": 4}).attn_norm_num_groups == 4


def test_refuses_shapes_that_do_not_fit(tiny):
    module, params, x_t, t = tiny
    for bad_x, bad_t, words in (
        (x_t[:, :3], t, "multiples of 2"),
        (jnp.zeros((2, 4, 8, 3)), t, "x_t has shape"),
        (x_t, t[:1], "t has shape"),
    ):
        with pytest.raises(UserError, match=words):
            module.apply({"params": params}, bad_x, bad_t)


def test_dropout_only_when_asked_for(tiny):
    module, params, x_t, t = tiny
    quiet = apply_tiny(params, x_t, t)
    apply = jax.jit(lambda rng: module.apply({"params": params}, x_t, t, deterministic=False, rngs={"dropout": rng}))
    noisy = [apply(jax.random.key(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert relative(noisy[0], quiet) > 0.01 and relative(noisy[2], noisy[0]) > 0.01
    assert relative(jax.jit(module.apply)({"params": params}, x_t, t), quiet) < 1e-6
    with pytest.raises(Exception, match="dropout"):
        jax.eval_shape(lambda: module.apply({"params": params}, x_t, t, deterministic=False))


def test_each_image_is_computed_alone(tiny):
    _, params, x_t, t = tiny
    both, swapped = apply_tiny(params, x_t, t), apply_tiny(params, x_t[::-1], t[::-1])
    assert relative(swapped[::-1], both) < 1e-6
    other = apply_tiny(params, x_t.at[1].set(0.0), t)
    assert relative(other[0], both[0]) < 1e-6 and relative(other[1], both[1]) > 0.01


def test_remat_changes_neither_value_nor_gradient_nor_dropout(rng):
    x, temb = jax.random.normal(rng, (1, 2, 2, 4)), jax.random.normal(rng, (1, 3))

    def block(remat):
        options = ResnetOptions(groups=2, dropout=0.5, remat=remat)
        return DownBlock2D(4, 1, options, AttentionOptions(head_dim=2, norm_num_groups=2), resampler=None)

    params = jax.jit(block(False).init)(rng, x, temb)["params"]

    def loss(params, remat):
        y, _ = block(remat).apply({"params": params}, x, temb, None, False, rngs={"dropout": jax.random.key(7)})
        return jnp.sum(jnp.square(y))

    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    (plain, plain_grads), (again, again_grads) = value_and_grad(params, False), value_and_grad(params, True)
    np.testing.assert_allclose(plain, again, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(plain_grads), jax.tree.leaves(again_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    # Residuals of the forward pass: with remat only the inputs of the resnet and of the attention are kept.
    kept = [len(jax.tree.leaves(jax.vjp(lambda p, remat=remat: loss(p, remat), params)[1])) for remat in (False, True)]
    assert kept[1] < kept[0]


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_outside(tiny):
    _, params, x_t, t = tiny
    half = UNet2D(**TINY, dtype=jnp.bfloat16)
    shapes = jax.eval_shape(half.init, jax.random.key(0), x_t, t)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    y, y_half = apply_tiny(params, x_t, t), jax.jit(half.apply)({"params": params}, x_t, t)
    assert y_half.dtype == jnp.float32
    assert 1e-4 < relative(y_half, y) < 0.05


def test_timestep_embedding_follows_the_formula():
    t = np.asarray([0, 1, 500, 999])
    for flip, shift, dim in ((True, 0, 32), (False, 1, 32), (True, 0, 33)):
        half = dim // 2
        angles = t[:, None] * np.exp(-np.log(10000) * np.arange(half) / (half - shift))
        parts = [np.cos(angles), np.sin(angles)] if flip else [np.sin(angles), np.cos(angles)]
        expected = np.concatenate([*parts, np.zeros((4, dim % 2))], axis=1)
        # t f up to 999 in float32: its last place is worth 6e-5.
        np.testing.assert_allclose(
            timestep_embedding(jnp.asarray(t), dim, flip_sin_to_cos=flip, freq_shift=shift), expected, atol=1e-4
        )


@pytest.mark.parametrize("dtype, limit", [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_silu_is_that_of_flax_in_value_and_derivatives(dtype, limit):
    x = jnp.concatenate([jnp.linspace(-120, 120, 4001), jnp.array([-1e30, -0.0, 1e30])]).astype(dtype)
    ours, own = silu, nn.silu
    for _ in range(3):
        y = jax.vmap(ours)(x)
        assert y.dtype == dtype and jnp.isfinite(y).all()
        np.testing.assert_allclose(np.float32(y), np.float32(jax.vmap(own)(x)), rtol=limit, atol=limit)
        ours, own = jax.grad(ours), jax.grad(own)
    check_grads(silu, (jnp.linspace(-3.0, 3.0, 7),), order=2, modes=["fwd", "rev"])


def test_group_norm_keeps_its_digits_far_from_zero(rng):
    x = 300.0 + np.asarray(jax.random.normal(rng, (2, 4, 5, 6)), np.float64)
    scale, bias = np.linspace(0.5, 2, 6), np.linspace(-1, 1, 6)
    expected = np.empty_like(x)
    for b in range(2):
        for group in (slice(0, 3), slice(3, 6)):
            part = x[b, :, :, group]
            expected[b, :, :, group] = (part - part.mean()) / np.sqrt(part.var() + 1e-5)
    params = {"scale": jnp.asarray(scale, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
    y = GroupNorm(2).apply({"params": params}, jnp.asarray(x, jnp.float32))
    assert relative(y, expected * scale + bias) < 1e-4


def test_attention_equals_loops_over_heads(rng):
    module = Attention(heads=2, dim_head=3, bias=True, norm_num_groups=2, residual_connection=True, rescale_output_factor=1.5)
    x = jax.random.normal(rng, (2, 2, 3, 4))
    params = jax.tree.map(lambda a: a + 0.1, jax.jit(module.init)(jax.random.key(1), x)["params"])
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    expected = np.empty(x.shape)
    normed = np.asarray(GroupNorm(2).apply({"params": params["group_norm"]}, x), np.float64)
    for b in range(2):
        tokens = normed[b].reshape(6, 4)
        query, key, value = (tokens @ p[name]["kernel"] + p[name]["bias"] for name in ("to_q", "to_k", "to_v"))
        heads = []
        for head in (slice(0, 3), slice(3, 6)):
            logits = query[:, head] @ key[:, head].T / np.sqrt(3)
            weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            heads.append(weights @ value[:, head])
        out = np.concatenate(heads, axis=1) @ p["to_out_0"]["kernel"] + p["to_out_0"]["bias"]
        expected[b] = (out.reshape(2, 3, 4) + np.asarray(x[b])) / 1.5
    assert relative(jax.jit(module.apply)({"params": params}, x), expected) < 1e-6


def test_the_bias_of_the_keys_has_a_gradient_of_exactly_zero(rng):
    """It cancels in the softmax. Rounding noise in its place would move it by AdamW's whole rate, differently for each layout."""
    attention = Attention(heads=2, dim_head=4, bias=True)
    x = jax.random.normal(rng, (2, 3, 3, 8))
    params = attention.init(rng, x)["params"]
    grads = jax.jit(jax.grad(lambda p: jnp.square(attention.apply({"params": p}, x)).sum()))(params)
    assert params["to_k"]["bias"].shape == (8,)
    for name in ("to_q", "to_k", "to_v"):
        for part in ("kernel", "bias"):
            assert bool((grads[name][part] == 0).all()) == ((name, part) == ("to_k", "bias")), (name, part)


def test_attention_to_a_context_of_another_width(rng):
    module = Attention(heads=2, dim_head=4)
    x, context = jax.random.normal(rng, (2, 6, 8)), jax.random.normal(rng, (2, 5, 3))
    params = jax.jit(module.init)(rng, x, context)["params"]
    assert params["to_k"]["kernel"].shape == (3, 8) and "bias" not in params["to_q"]
    apply = jax.jit(module.apply)
    order = jnp.asarray([4, 2, 0, 1, 3])  # attention does not know the order of its context
    y, permuted = apply({"params": params}, x, context), apply({"params": params}, x, context[:, order])
    np.testing.assert_allclose(permuted, y, atol=1e-6)


@pytest.mark.parametrize("norm", ["default", "scale_shift"])
def test_resnet_gradients_equal_finite_differences(norm, rng):
    module = ResnetBlock2D(4, ResnetOptions(groups=2, eps=1e-6, time_scale_shift=norm))
    x, temb = jax.random.normal(rng, (1, 2, 2, 2)), jax.random.normal(rng, (1, 3))
    params = jax.jit(module.init)(rng, x, temb)["params"]
    apply = jax.jit(lambda p, x, temb: module.apply({"params": p}, x, temb))
    check_grads(apply, (params, x, temb), order=1, modes=["rev", "fwd"], rtol=2e-2, atol=2e-2)


def test_resampling_by_repetition_and_mean():
    x = jnp.arange(2 * 3 * 2, dtype=jnp.float32).reshape(1, 2, 3, 2)
    up = upsample_nearest(x)
    np.testing.assert_array_equal(up, np.repeat(np.repeat(x, 2, axis=1), 2, axis=2))
    np.testing.assert_array_equal(downsample_mean(up), x)
    np.testing.assert_array_equal(downsample_mean(x), np.asarray(x)[:, :, :2].mean(axis=(1, 2), keepdims=True))


@pytest.mark.parametrize(
    "option",
    [
        {"layers_per_block": 1.5}, {"layers_per_block": 10**7}, {"block_out_channels": [10**9, 10**9]}, {"in_channels": -1},
        {"block_out_channels": [4] * 40}, {"norm_eps": "x"}, {"add_attention": 1}, {"down_block_types": "DownBlock2D"},
        {"dropout": float("nan")}, {"downsample_padding": 10**6}, {"act_fn": None}, {"attention_head_dim": [4, 4]},
        {"mid_block_scale_factor": 0}, {"time_embedding_dim": "a" * 5000},
    ],
    ids=str,
)  # fmt: skip
def test_values_of_another_kind_or_range_are_refused_before_anything_is_laid_out(option):
    with pytest.raises(UserError, match=f"config's {next(iter(option))} is .*it must be"):
        UNet2D.from_config({**TINY, **option})
