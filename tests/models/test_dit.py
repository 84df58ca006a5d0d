"""Diffusion transformers: how they start, what they take, and the channels of a learned variance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrack_jax.api import unlearn
from retrack_jax.checks import UserError
from retrack_jax.config.options import Options
from retrack_jax.data.dataset import image_set
from retrack_jax.diffusion.conversions import make_eps_fn
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.models.dit import DiT
from retrack_jax.models.unet2d import UNet2D
from retrack_jax.problem.codec import PixelCodec
from retrack_jax.problem.denoiser import _check_fits, image_denoiser
from retrack_jax.sampling import initial_noise, make_sampler, sample

SMALL = {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 1, "num_layers": 2, "sample_size": 4, "patch_size": 2}
X, T = jnp.linspace(-1, 1, 48).reshape(3, 4, 4, 1), jnp.array([0.5, 300.0, 999.0])


def network(**options):
    module = DiT.from_config({**SMALL, "num_embeds_ada_norm": 1, **options})
    params = jax.jit(module.init)(jax.random.key(0), X, T, jnp.zeros(3, jnp.int32))["params"]
    noise = jax.random.split(jax.random.key(1), len(jax.tree.leaves(params)))
    draw = jax.tree.unflatten(jax.tree.structure(params), list(noise))
    return module, params, jax.tree.map(lambda leaf, rng: leaf + 0.2 * jax.random.normal(rng, leaf.shape), params, draw)


def test_a_new_network_says_zero_and_a_trained_one_depends_on_all_it_is_given():
    module, fresh, params = network(num_embeds_ada_norm=3)
    label = jnp.array([0, 1, 3])
    assert np.all(module.apply({"params": fresh}, X, T, label) == 0)
    out = module.apply({"params": params}, X, T, label)
    assert out.shape == X.shape
    for other in ((X[::-1], T, label), (X, T + 1, label), (X, T, label.at[2].set(2))):
        assert np.abs(module.apply({"params": params}, *other) - out).max() > 1e-4
    moved = jnp.roll(X, 2, axis=2)  # positions count: the same patches elsewhere are not the same output elsewhere
    assert np.abs(jnp.roll(module.apply({"params": params}, moved, T, label), -2, axis=2) - out).max() > 1e-4


def test_remat_and_bfloat16_compute_the_same():
    module, _, params = network()
    out = module.apply({"params": params}, X, T)
    np.testing.assert_allclose(module.clone(remat=True).apply({"params": params}, X, T), out, atol=1e-6)
    half = module.clone(dtype=jnp.bfloat16).apply({"params": params}, X, T)
    assert half.dtype == jnp.float32 and np.abs(half - out).max() < 0.1 * np.abs(out).max()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"norm_type": "layer_norm"}, 'norm_type is .*only "ada_norm_zero"'),
        ({"patch_size": 3}, "patch_size is 3; it must divide sample_size, 4"),
        ({"attention_head_dim": 3}, "is 6; 4 must divide it"),
        ({"num_layers": 200}, "num_layers is 200; it must be a whole number from 1 to 128"),
        ({"num_layer": 2}, "'num_layer'.*did you mean 'num_layers'"),
        ({"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero", "num_vector_embeds": 4}, "sets num_vector_embeds"),
        ({"_class_name": "Transformer2DModel"}, "the config is of a Transformer2DModel"),
    ],
)
def test_configs_that_are_refused(config, message):
    with pytest.raises(UserError, match=message) as error:
        DiT.from_config({**SMALL, **config})
    assert "\n" not in str(error.value)


def test_inputs_that_are_refused():
    module, _, params = network(num_embeds_ada_norm=3)
    with pytest.raises(UserError, match="takes a label from 0 to 3"):
        module.apply({"params": params}, X, T)
    with pytest.raises(UserError, match="needs squares"):
        module.apply({"params": params}, X[:, :2], T, jnp.zeros(3, jnp.int32))


def variance_columns(params):
    """The columns of the output's kernel and bias that make the variance: the second of each pixel's two channels."""
    return params["proj_out_2"]["kernel"].reshape(-1, 4, 2)[..., 1], params["proj_out_2"]["bias"].reshape(4, 2)[..., 1]


def test_losses_leave_a_learned_variance_as_it_is(rng):
    module, _, params = network(out_channels=2)
    schedule = Schedule.create(variance_type="learned_range")
    eps_fn, whole = (make_eps_fn(module.apply, schedule, with_variance=more) for more in (False, True))
    np.testing.assert_array_equal(eps_fn(params, X, T), module.apply({"params": params}, X, T)[..., :1])
    np.testing.assert_array_equal(whole(params, X, T), module.apply({"params": params}, X, T))
    images = np.random.default_rng(0).uniform(-1, 1, (14, 4, 4, 1)).astype(np.float32)
    how = {"num_steps": 2, "batch_size": 4, "num_neighbors": 3, "rng": rng}
    after = unlearn(module.apply, params, schedule, images[:12], images[12:], **how)
    for old, new in zip(variance_columns(params), variance_columns(after), strict=True):
        np.testing.assert_array_equal(old, new)
    assert np.abs(after["proj_out_2"]["bias"] - params["proj_out_2"]["bias"]).max() > 0


def test_ddpm_draws_with_the_learned_variance_between_both_fixed_ones(rng):
    """v = -1 is fixed_small, v = 1 is fixed_large, and v = 0 lies between them."""
    rngs = jax.random.split(rng, 4)
    start = initial_noise(rngs, (8,))

    def drawn(variance_type, v=None):
        sampler = make_sampler("ddpm", Schedule.create(variance_type=variance_type), 20)

        def eps_fn(x, t):
            eps = 0.3 * x
            return eps if v is None else jnp.concatenate([eps, jnp.full_like(x, v)], axis=-1)

        return np.asarray(sample(eps_fn, start, rngs, sampler))

    np.testing.assert_allclose(drawn("learned_range", -1.0), drawn("fixed_small"), atol=1e-5)
    np.testing.assert_allclose(drawn("learned_range", 1.0), drawn("fixed_large"), atol=1e-5)
    between = drawn("learned_range", 0.0)
    assert np.abs(between - drawn("fixed_small")).max() > 1e-3 and np.abs(between - drawn("fixed_large")).max() > 1e-3


IMAGES = image_set("grays", np.zeros((4, 4, 4, 1), np.uint8), list("abcd"))


@pytest.mark.parametrize(
    ("out_channels", "schedule", "message"),
    [
        (2, Schedule.rectified_flow(), "makes 2 channels of 1, eps and its variance, and the schedule is a flow's"),
        (3, Schedule(), "makes 3 channels of 1; it must make as many, or twice as many"),
        (1, Schedule.create(variance_type="learned_range"), "variance_type is learned_range, and the network makes no variance"),
    ],
)
def test_a_network_and_a_schedule_that_do_not_belong_together_are_refused(out_channels, schedule, message):
    with pytest.raises(UserError, match=message) as error:
        module = DiT.from_config({**SMALL, "num_embeds_ada_norm": 1, "out_channels": out_channels})
        _check_fits(module, (4, 4, 1), "the images", schedule)
    assert "\n" not in str(error.value)


def test_a_network_with_a_row_for_each_timestep_is_no_flows():
    blocks = {"block_out_channels": (4,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    learned = {"time_embedding_type": "learned", "num_train_timesteps": 1000}
    module = UNet2D(**blocks, **learned, in_channels=1, out_channels=1, norm_num_groups=2, add_attention=False)
    with pytest.raises(UserError, match="time_embedding_type is learned, with a row for each whole timestep"):
        _check_fits(module, (4, 4, 1), "the images", Schedule.rectified_flow())


def test_a_new_network_of_the_config_is_a_transformer(tmp_path):
    fields = {"sample_size": 4, "in_channels": 1, "num_layers": 1, "attention_head_dim": 8}
    options = Options(network="dit", dit=Options().dit.__class__(**fields))
    denoiser = image_denoiser(options, IMAGES, PixelCodec(tmp_path))
    assert isinstance(denoiser.module, DiT) and not denoiser.takes_labels and denoiser.shape == (4, 4, 1)
    with pytest.raises(UserError, match="network is 'vit'"):
        Options(network="vit")
