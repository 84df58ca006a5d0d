"""Stable Diffusion 3's transformer: what it depends on, what it refuses, and which of its parameters are not trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrack_jax.checkpoints.diffusers_import import example_inputs
from retrack_jax.checks import UserError
from retrack_jax.models.mmdit import MMDiT
from tests.tiny_sd import hasty_compiler
from tests.tiny_xl import random_params

SMALL = {
    "sample_size": 4, "in_channels": 3, "out_channels": 3, "num_layers": 2, "attention_head_dim": 4, "num_attention_heads": 2,
    "caption_projection_dim": 8, "joint_attention_dim": 6, "pooled_projection_dim": 5, "pos_embed_max_size": 5,
}  # fmt: skip
NUMBERS = np.random.default_rng(0)
X, T = NUMBERS.normal(size=(2, 4, 4, 3)).astype(np.float32), np.float32([3, 700])
PROMPT = {"encoder_hidden_states": NUMBERS.normal(size=(2, 7, 6)), "text_embeds": NUMBERS.normal(size=(2, 5))}
PROMPT = {name: value.astype(np.float32) for name, value in PROMPT.items()}


def network(**options):
    module = MMDiT.from_config({**SMALL, **options})
    return module, random_params(module, 1, *example_inputs(module))


@pytest.mark.parametrize("options", [{}, {"qk_norm": "rms_norm", "dual_attention_layers": [1]}])
def test_the_output_depends_on_all_that_is_given(options):
    module, params = network(**options)
    apply = jax.jit(module.apply)
    out = apply({"params": params}, X, T, PROMPT)
    assert out.shape == X.shape and out.dtype == jnp.float32
    changed = (X[::-1], T, PROMPT), (X, T + 1, PROMPT), (X, T, {**PROMPT, "text_embeds": PROMPT["text_embeds"] + 1})
    for other in (*changed, (X, T, {**PROMPT, "encoder_hidden_states": -PROMPT["encoder_hidden_states"]})):
        assert np.abs(apply({"params": params}, *other) - out).max() > 1e-3
    one = {name: value[:1] for name, value in PROMPT.items()}  # for all images
    both = {name: np.repeat(value, 2, axis=0) for name, value in one.items()}
    np.testing.assert_allclose(apply({"params": params}, X, T, one), apply({"params": params}, X, T, both), atol=1e-6)


def test_remat_and_bfloat16_compute_the_same():
    module, params = network(qk_norm="rms_norm", dual_attention_layers=[0])
    modules = module, module.clone(remat=True), module.clone(dtype=jnp.bfloat16)
    with hasty_compiler():
        out, again, half = (jax.jit(one.apply)({"params": params}, X, T, PROMPT) for one in modules)
    np.testing.assert_allclose(again, out, atol=1e-6)
    assert half.dtype == jnp.float32 and np.abs(half - out).max() < 0.1 * np.abs(out).max()


def test_positions_have_no_gradient_and_every_other_parameter_that_counts_has_one():
    module, params = network(qk_norm="rms_norm", dual_attention_layers=[0])
    with hasty_compiler():
        gradient = jax.jit(jax.grad(lambda params: jnp.square(module.apply({"params": params}, X, T, PROMPT)).sum()))(params)
    idle = {jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(gradient) if not np.any(leaf)}
    # the last block gives no prompt on, so what its prompt asks counts for nothing
    last = "['transformer_blocks_1']['attn']"
    queries = {f"{last}['add_q_proj']['kernel']", f"{last}['add_q_proj']['bias']", f"{last}['norm_added_q']['scale']"}
    assert idle == {"['pos_embed']['pos_embed']", *queries}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'; choose one of None, rms_norm"),
        ({"caption_projection_dim": 12}, "caption_projection_dim is 12; it must be the image's width, 8"),
        ({"attention_head_dim": 3, "caption_projection_dim": 6}, "is 6; 4 must divide it"),
        ({"pos_embed_max_size": None}, "pos_embed_max_size is None; it must be a whole number"),
        ({"dual_attention_layers": "all"}, "dual_attention_layers is 'all'; it must list blocks"),
        ({"num_layer": 2}, "'num_layer'.*did you mean 'num_layers'"),
        ({"_class_name": "FluxTransformer2DModel"}, "the config is of a FluxTransformer2DModel"),
    ],
)
def test_configs_that_are_refused(config, message):
    with pytest.raises(UserError, match=message) as error:
        MMDiT.from_config({**SMALL, **config})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("x", "prompt", "message"),
    [
        (X[:, :3], PROMPT, "sides that 2 divides"),
        (X[..., :2], PROMPT, "needs 3 channels"),
        (np.zeros((2, 4, 12, 3)), PROMPT, "2 x 6 patches, and the network 5 a side"),
        (X, {**PROMPT, "text_embeds": np.zeros((2, 4))}, "they need 6 and 5 features"),
    ],
)
def test_inputs_that_are_refused(x, prompt, message):
    module, params = network()
    with pytest.raises(UserError, match=message):
        module.apply({"params": params}, x, T, prompt)
