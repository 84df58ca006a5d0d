"""Losses against a float64 oracle with loops, known answers, and the extremes of t and D."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from retrack_jax.unlearn import losses
from tests.oracles import losses as oracle
from tests.oracles import record

CASES = record.load()
TIMES = (0, 999)


def arrays(case, *names):
    return [jnp.asarray(CASES[case]["in"][name]) for name in names]


def close(ours, reference, tolerance=2e-5):
    """Whole-array relative error, in the units of the reference."""
    reference = np.asarray(reference, np.float64)
    scale = max(np.linalg.norm(reference), 1e-12)
    assert np.linalg.norm(np.asarray(ours, np.float64) - reference) <= tolerance * scale


@pytest.mark.parametrize("name, second", [("vanilla", "eps"), ("neggrad", "eps"), ("erasediff", "uniform")])
def test_plain_losses_and_gradients(name, second):
    inputs = arrays(name, "eps_pred", second)
    loss = getattr(losses, name)
    close(loss(*inputs), CASES[name]["out"]["loss"])
    close(jax.grad(lambda e: loss(e, inputs[1]).sum())(inputs[0]), CASES[name]["out"]["grad"])


@pytest.mark.parametrize("case", ["siss_0", "siss_0.1", "siss_0.5", "siss_1"])
def test_siss(case):
    inputs = arrays(case, "eps_pred", "x_t", "remain", "forget", "gamma", "sigma")
    mixture = float(CASES[case]["in"]["mixture"])
    expected = CASES[case]["out"]
    main, correction = losses.siss(*inputs, mixture)
    weights = losses.siss_weights(*inputs[1:], mixture)
    assert all(bool(jnp.isfinite(value).all()) for value in (main, correction, *weights))
    # Weights that float32 can hold; beyond, ours are cut (see _MAX_LOG_WEIGHT).
    for ours, log_weight in zip(weights, oracle.siss_log_weights(*map(np.asarray, inputs[1:]), mixture), strict=True):
        # The exponent is a difference of size up to 1e4 in float32, so the weight's relative error is 1e4 x 1e-7.
        np.testing.assert_allclose(ours, np.exp(np.minimum(log_weight, 60.0)), rtol=5e-3, atol=1e-30)
    small = (np.asarray(expected["w_a"]) < 1e20) & (np.asarray(expected["w_f"]) < 1e20)
    for ours, name in ((main, "main"), (correction, "correction")):
        close(np.asarray(ours)[small], expected[name][small], 5e-3)
    for index, name in enumerate(("main_grad", "correction_grad")):
        grad = jax.grad(lambda e, i=index: losses.siss(e, *inputs[1:], mixture)[i].sum())(inputs[0])
        assert bool(jnp.isfinite(grad).all())
        close(np.asarray(grad)[small], expected[name][small], 5e-3)


@pytest.mark.parametrize("mixture", [0.1, 0.5])
def test_siss_of_pairs_under_two_conditions_knows_where_a_point_came_from(mixture):
    """p(x_t, c | y) is 0 under a condition that y does not have, so a weight is 0 or the inverse of its share in the mixture."""
    inputs = arrays("siss_0.5", "eps_pred", "x_t", "remain", "forget", "gamma", "sigma")
    source = jnp.asarray(np.resize([1.0, -1.0, 0.0], len(inputs[1])))
    weights = losses.siss_weights(*inputs[1:], mixture, source)
    either = losses.siss_weights(*inputs[1:], mixture)
    for ours, same, known in zip(weights, either, ([0.0, 1 / (1 - mixture)], [1 / mixture, 0.0]), strict=True):
        expected = np.where(source == 1, known[0], np.where(source == -1, known[1], same))
        np.testing.assert_allclose(ours, expected, rtol=1e-6)
    main, correction = losses.siss(*inputs, mixture, source)
    assert float(correction[1]) == 0.0 and float(main[0]) == 0.0


@pytest.mark.parametrize("mixture", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("distance", [1e-4, 1.0, 100.0])
@pytest.mark.parametrize("source", ["remain", "forget"])
def test_siss_weights_are_finite_for_far_and_near_pairs(mixture, distance, source):
    rng = np.random.default_rng(0)
    remain = rng.uniform(-1, 1, (2, 28, 28, 1)).astype(np.float32)
    forget = (remain + distance * rng.standard_normal(remain.shape)).astype(np.float32)
    gamma, sigma = record.schedule(TIMES)
    clean = remain if source == "remain" else forget
    x_t = gamma[:, None, None, None] * clean + sigma[:, None, None, None] * rng.standard_normal(remain.shape)
    inputs = [jnp.asarray(a, jnp.float32) for a in (x_t, remain, forget, gamma, sigma)]
    w_a, w_f = losses.siss_weights(*inputs, mixture)
    main, correction = losses.siss(jnp.zeros_like(inputs[0]), *inputs, mixture)
    assert all(bool(jnp.isfinite(value).all()) for value in (w_a, w_f, main, correction))
    # The identity (1 - lambda) w_a + lambda w_f = 1 for the true mixture density.
    if (mixture, source) not in {(0.0, "forget"), (1.0, "remain")}:
        np.testing.assert_allclose((1 - mixture) * w_a + mixture * w_f, 1.0, rtol=1e-5)


@pytest.mark.parametrize("case", ["retrack", "retrack_mnist"])
def test_retrack_value_posterior_target_and_gradient(case):
    eps_pred, *point = arrays(case, "eps_pred", "x_t", "neighbors", "gamma", "sigma")
    expected = CASES[case]["out"]
    np.testing.assert_allclose(losses.retrack_posterior(*point), expected["p"], atol=2e-6)
    target, spread = losses.retrack_target(*point)
    close(target, expected["target"])
    close(spread, expected["constant"], 1e-4)
    close(losses.retrack(eps_pred, *point), expected["loss"], 1e-4)
    close(jax.grad(lambda e: losses.retrack(e, *point).sum())(eps_pred), expected["grad"])


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 32, 3), (256, 256, 3)])
def test_posterior_is_right_at_every_size_and_end_of_time(shape, t):
    """Plain float32 sums of squares put p wrong by 7e-4 at the largest size and t = 999."""
    rng = np.random.default_rng(1)
    size = int(np.prod(shape))
    forget = rng.uniform(-1, 1, (1, *shape))
    gamma, sigma = record.schedule([t])
    # Neighbors whose logits differ by about one at this t, so that no weight is 0 or 1.
    step = float(sigma[0] / gamma[0]) / np.sqrt(size)
    neighbors = np.clip(forget[:, None] + step * rng.standard_normal((1, 4, *shape)), -1, 1).astype(np.float32)
    x_t = (gamma[0] * forget + sigma[0] * rng.standard_normal(forget.shape)).astype(np.float32)
    # The oracle in float64 from the same float32 inputs, vectorised over pixels for speed.
    v = (x_t[:, None].astype(np.float64) - float(gamma[0]) * neighbors.astype(np.float64)) / float(sigma[0])
    logits = -0.5 * (v**2).sum((2, 3, 4))
    p = np.exp(logits - logits.max())
    p /= p.sum()
    ours = losses.retrack_posterior(*(jnp.asarray(a) for a in (x_t, neighbors, gamma, sigma)))
    assert 0.01 < p.max() < 0.99
    # At t = 0 the inputs themselves, float32, are known to 6e-8 x gamma/sigma = 6e-6 of a noise unit.
    np.testing.assert_allclose(ours, p, atol=2e-5 if t == 0 else 2e-6)
    target, _ = losses.retrack_target(*(jnp.asarray(a) for a in (x_t, neighbors, gamma, sigma)))
    close(target, np.einsum("bk,bkhwc->bhwc", p, v), 1e-5)


def test_one_neighbor_is_the_plain_loss_to_its_noise():
    eps_pred, x_t, neighbors, gamma, sigma = arrays("retrack", "eps_pred", "x_t", "neighbors", "gamma", "sigma")
    one = neighbors[:, :1]
    noise = (x_t - gamma[:, None, None, None] * one[:, 0]) / sigma[:, None, None, None]
    np.testing.assert_allclose(losses.retrack(eps_pred, x_t, one, gamma, sigma), losses.vanilla(eps_pred, noise), rtol=1e-5)


def test_tied_neighbors_share_the_weight():
    x_t, neighbors, gamma, sigma = arrays("retrack", "x_t", "neighbors", "gamma", "sigma")
    tied = jnp.repeat(neighbors[:, :1], 4, axis=1)
    np.testing.assert_allclose(losses.retrack_posterior(x_t, tied, gamma, sigma), 0.25, atol=1e-7)
    _, spread = losses.retrack_target(x_t, tied, gamma, sigma)
    np.testing.assert_array_equal(spread, 0.0)


def test_all_of_the_remain_set_gives_its_exact_posterior_mean():
    x_t, remain, gamma, sigma = arrays("exact_remain", "x_t", "remain", "gamma", "sigma")
    neighbors = jnp.broadcast_to(remain[None], (len(x_t), *remain.shape))
    target, _ = losses.retrack_target(x_t, neighbors, gamma, sigma)
    close(target, CASES["exact_remain"]["out"]["noise"])


def test_gradients_by_finite_differences():
    eps_pred, x_t, neighbors, gamma, sigma = arrays("retrack", "eps_pred", "x_t", "neighbors", "gamma", "sigma")
    middle = slice(2, 4)  # t = 100 and 500: finite differences in float32 need losses of a moderate size
    point = x_t[middle], neighbors[middle], gamma[middle], sigma[middle]
    check_grads(lambda e: losses.retrack(e, *point), (eps_pred[middle],), order=1, modes=["rev"], atol=0.05, rtol=0.05, eps=1e-2)
    check_grads(lambda e: losses.vanilla(e, x_t), (eps_pred,), order=1, modes=["rev"], atol=0.05, rtol=0.05, eps=1e-2)


def test_no_gradient_passes_through_the_posterior():
    eps_pred, x_t, neighbors, gamma, sigma = arrays("retrack", "eps_pred", "x_t", "neighbors", "gamma", "sigma")
    grad = jax.grad(lambda a: losses.retrack(eps_pred, x_t, a, gamma, sigma).sum())(neighbors)
    np.testing.assert_array_equal(grad, 0.0)


def test_shapes_are_checked():
    x = jnp.zeros((2, 4, 4, 1))
    with pytest.raises(ValueError, match="one shape"):
        losses.vanilla(x, x[:1])
    with pytest.raises(ValueError, match="neighbors"):
        losses.retrack(x, x, jnp.zeros((2, 4, 4, 1)), jnp.ones(2), jnp.ones(2))
