"""The likelihood on Gaussian data, whose score is exact, in both modes; order of convergence; error bars; refusals."""

import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrack_jax.checks import UserError
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.metrics import likelihood
from retrack_jax.metrics.likelihood import nll_bits_per_dim

SIDE = 4
DIM = SIDE * SIDE
SCHEDULE = Schedule.from_config({})


def _alpha_bar(t):
    """The discrete table for an integer t, the continuous limit for a float one."""
    if jnp.issubdtype(t.dtype, jnp.integer):
        return jnp.asarray(SCHEDULE.alpha_bar)[t]
    s = (t + 1.0) / 1000.0
    return jnp.exp(-0.1 * s - 9.95 * s**2)


def _gaussian_eps(basis, x, t):
    """The exact eps of N(0, basis diag(variances) basis^T): params = (basis [D, D], variances [D])."""
    rotation, variances = basis
    alpha_bar = _alpha_bar(t).astype(x.dtype)[:, None]
    y = x.reshape(len(x), -1) @ rotation
    y = y * jnp.sqrt(1 - alpha_bar) / (alpha_bar * variances[None] + 1 - alpha_bar)
    return (y @ rotation.T).reshape(x.shape)


def _isotropic(std):
    return jnp.eye(DIM), jnp.full((DIM,), std**2, jnp.float32)


def _exact_bits(x, variances, rotation=None):
    y = x.reshape(len(x), -1) @ (np.eye(DIM) if rotation is None else rotation)
    log_p = -0.5 * (y**2 / variances + np.log(2 * np.pi * variances)).sum(axis=1)
    return -log_p / (DIM * math.log(2)) + 7


@pytest.mark.parametrize(("std", "official", "continuous"), [(0.5, 0.0015, 0.0005), (0.1, 0.01, 0.001)])
def test_gaussian_data_has_the_known_answer(std, official, continuous, rng):
    x = np.random.default_rng(0).normal(size=(3, SIDE, SIDE, 1)) * std
    exact = _exact_bits(x, np.full(DIM, std**2))
    for mode, tolerance in (("official", official), ("continuous", continuous)):
        bits, stderr = nll_bits_per_dim(_gaussian_eps, _isotropic(std), SCHEDULE, x, rng, mode=mode)
        assert bits.shape == (3,) and stderr is None
        np.testing.assert_allclose(bits, exact, atol=tolerance, err_msg=mode)


def test_each_image_is_measured_under_its_own_condition(rng):
    """A network of two classes, each exact for data of another width: every image has the likelihood of its class."""
    stds, labels = np.array([0.5, 0.2], np.float32), np.array([1, 0, 1], np.int32)

    def eps_fn(params, x, t, label):
        rotation, variances = params
        return _gaussian_eps((rotation, variances[label[0]]), x, t)

    x = np.random.default_rng(0).normal(size=(3, SIDE, SIDE, 1)) * stds[labels][:, None, None, None]
    params = jnp.eye(DIM), jnp.tile(jnp.asarray(stds)[:, None] ** 2, (1, DIM))
    bits, _ = nll_bits_per_dim(eps_fn, params, SCHEDULE, x, rng, conditions=labels)
    exact = [_exact_bits(x[i : i + 1], np.full(DIM, stds[label] ** 2))[0] for i, label in enumerate(labels)]
    np.testing.assert_allclose(bits, exact, atol=0.01)


def test_official_right_hand_side_errs_more_on_narrow_data_and_continuous_does_not(rng):
    std = 0.02
    x = np.random.default_rng(0).normal(size=(3, SIDE, SIDE, 1)) * std
    exact = _exact_bits(x, np.full(DIM, std**2))
    official = nll_bits_per_dim(_gaussian_eps, _isotropic(std), SCHEDULE, x, rng)[0] - exact
    assert 0.002 < np.abs(official).mean() < 0.1


def test_probes_give_an_error_bar_that_covers_the_truth(rng):
    # A correlated Gaussian: its Jacobian is not diagonal, so probes differ.
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(DIM, DIM)))[0]
    variances = np.geomspace(0.05, 0.8, DIM)
    y = np.random.default_rng(2).normal(size=(2, DIM)) * np.sqrt(variances)
    x = (y @ rotation.T).reshape(2, SIDE, SIDE, 1)
    params = jnp.asarray(rotation, jnp.float32), jnp.asarray(variances, jnp.float32)
    bits, stderr = nll_bits_per_dim(_gaussian_eps, params, SCHEDULE, x, rng, num_probes=32, mode="continuous")
    assert (stderr > 1e-3).all()
    assert (np.abs(bits - _exact_bits(x, variances, rotation)) < 4 * stderr).all()


def test_an_images_number_does_not_depend_on_the_batch_and_is_compiled_once(rng):
    x = np.random.default_rng(0).normal(size=(3, SIDE, SIDE, 1)) * np.array([0.1, 0.5, 1.0])[:, None, None, None]
    params, traces = _isotropic(0.5), []

    def eps_fn(*args):
        traces.append(args)
        return _gaussian_eps(*args)

    whole, _ = nll_bits_per_dim(eps_fn, params, SCHEDULE, x, rng)
    traced = len(traces)
    again, _ = nll_bits_per_dim(eps_fn, _isotropic(0.4), SCHEDULE, x, rng)
    assert len(traces) == traced > 0
    assert not np.allclose(again, whole)
    reordered, _ = nll_bits_per_dim(eps_fn, params, SCHEDULE, x[[0, 2, 1]], rng)
    np.testing.assert_allclose(reordered[[0, 2, 1]], whole, atol=1e-4)


def test_pairs_of_image_and_probe_are_solved_in_blocks_that_change_nothing(rng, monkeypatch):
    x = np.random.default_rng(0).normal(size=(5, SIDE, SIDE, 1)) * 0.5
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(DIM, DIM)))[0]  # so that probes differ
    params = jnp.asarray(rotation, jnp.float32), jnp.geomspace(0.05, 0.8, DIM)
    blocks, real = [], likelihood.in_blocks

    def counted(score, *rest):
        return real(lambda numbers: blocks.append(numbers.shape) or score(numbers), *rest)

    monkeypatch.setattr(likelihood, "in_blocks", counted)
    options = {"num_probes": 2, "mode": "continuous"}
    whole, whole_stderr = nll_bits_per_dim(_gaussian_eps, params, SCHEDULE, x, rng, **options)
    parts, parts_stderr = nll_bits_per_dim(_gaussian_eps, params, SCHEDULE, x, rng, **options, batch_size=1)
    assert blocks == [(4, 3), (4, 1), (4, 1), (4, 1)]
    np.testing.assert_allclose(parts, whole, atol=1e-4)
    np.testing.assert_allclose(parts_stderr, whole_stderr, atol=1e-4)
    assert np.ptp(whole) > 0.01 and (whole_stderr > 1e-3).all()


def test_dormand_prince_converges_with_order_five_on_the_continuous_mode(rng):
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(1, SIDE, SIDE, 1)) * 0.3)
        sigma = jnp.asarray(np.asarray(SCHEDULE.sigma), jnp.float64)
        params = jnp.eye(DIM, dtype=jnp.float64), jnp.full((DIM,), 0.3**2, jnp.float64)

        def log_p(num_steps):
            options = {"mode": "continuous", "rtol": 1e-5, "atol": 1e-5, "fixed_step": 1 / num_steps}
            solve = jax.jit(functools.partial(likelihood._log_likelihoods, eps_fn=_gaussian_eps, **options))
            return float(solve(params, sigma, x, rng, *np.zeros((2, 1), np.int32))[0])

        values = [log_p(num_steps) for num_steps in (64, 128, 256, 1024)]
        errors = [abs(value - values[-1]) for value in values[:-1]]
    orders = [math.log2(errors[i] / errors[i + 1]) for i in range(2)]
    assert all(4.2 < order < 5.5 for order in orders), (errors, orders)


def test_a_unet_goes_through_forward_mode(rng):
    from retrack_jax.models.unet2d import UNet2D

    blocks = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",), "block_out_channels": (4,)}
    sizes = {"sample_size": SIDE, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "attention_head_dim": None}
    module = UNet2D(**sizes, **blocks, norm_num_groups=2)
    x, t = jnp.full((1, SIDE, SIDE, 1), 0.3), jnp.zeros((1,), jnp.int32)
    params = jax.jit(module.init)(rng, x, t)

    def eps_fn(params, x, t):
        return module.apply(params, x, t)

    bits, _ = nll_bits_per_dim(eps_fn, params, SCHEDULE, np.asarray(x), rng, rtol=1e-2, atol=1e-2)
    assert np.isfinite(bits).all()


def test_refuses(rng):
    x = np.zeros((3, SIDE, SIDE, 1), np.float32)
    other = Schedule.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
    with pytest.raises(UserError, match="another, so leave nll_bits_per_dim out"):
        nll_bits_per_dim(_gaussian_eps, _isotropic(0.5), other, x, rng)
    velocity = Schedule.from_config({"prediction_type": "v_prediction"})
    with pytest.raises(UserError, match="mode is continuous.* this model predicts v_prediction.* use the official mode"):
        nll_bits_per_dim(_gaussian_eps, _isotropic(0.5), velocity, x, rng, mode="continuous")
    with pytest.raises(UserError, match="choose one of official, continuous"):
        nll_bits_per_dim(_gaussian_eps, _isotropic(0.5), SCHEDULE, x, rng, mode="offical")
    with pytest.raises(UserError, match="NaN or infinity"):
        nll_bits_per_dim(_gaussian_eps, _isotropic(0.5), SCHEDULE, x * np.nan, rng)
    with pytest.raises(UserError, match="noise prediction is not finite"):
        nll_bits_per_dim(_gaussian_eps, _isotropic(np.nan), SCHEDULE, x, rng)
    with pytest.raises(UserError, match="num_probes"):
        nll_bits_per_dim(_gaussian_eps, _isotropic(0.5), SimpleNamespace(sigma=SCHEDULE.sigma), x, rng, num_probes=0)
