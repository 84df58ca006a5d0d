"""The oracle against numbers worked by hand, closed forms, quadrature and finite differences."""

import math

import numpy as np
import pytest

from tests.oracles import losses as oracle
from tests.oracles import record

# One image of two pixels, worked by hand: gamma 0.6, sigma 0.8, x_t (1, 1). From A = (-1, 1/3) the noise is
# ((1 + 0.6) / 0.8, (1 - 0.2) / 0.8) = (2, 1), d = 2.5; from F = (1/3, 1/3) it is (1, 1), d = 1.
# The gap d_A - d_F is 1.5.
GAMMA, SIGMA = np.array([0.6]), np.array([0.8])
X_T = np.array([[1.0, 1.0]])
A = np.array([[-1.0, 1 / 3]])
F = np.array([[1 / 3, 1 / 3]])
ZERO = np.zeros((1, 2))
SMALL = 1.0 / (1.0 + math.exp(1.5))  # 0.1824255238
LARGE = 1.0 / (1.0 + math.exp(-1.5))  # 0.8175744762


def close(actual, expected, rtol=1e-12, atol=1e-14):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def central_difference(function, point, step=1e-5):
    """Gradient of a scalar function by central differences."""
    grad = np.zeros_like(point)
    for index in np.ndindex(point.shape):
        moved = np.zeros_like(point)
        moved[index] = step
        grad[index] = (function(point + moved) - function(point - moved)) / (2.0 * step)
    return grad


def test_plain_losses_sum_over_pixels():
    eps_pred = np.array([[[[1.0], [2.0]]], [[[0.0], [-1.0]]]], dtype=np.float32)  # [2, 1, 2, 1]
    eps = np.array([[[[0.0], [4.0]]], [[[0.5], [-1.0]]]], dtype=np.float32)
    close(oracle.vanilla(eps_pred, eps), [5.0, 0.25])
    close(oracle.neggrad(eps_pred, eps), [-5.0, -0.25])
    close(oracle.erasediff(eps_pred, eps), [5.0, 0.25])
    close(oracle.vanilla_grad(eps_pred, eps).ravel(), [2.0, -4.0, -1.0, 0.0])
    close(oracle.neggrad_grad(eps_pred, eps).ravel(), [-2.0, 4.0, 1.0, 0.0])
    close(oracle.erasediff_grad(eps_pred, eps).ravel(), [2.0, -4.0, -1.0, 0.0])
    assert oracle.vanilla_grad(eps_pred, eps).shape == eps_pred.shape
    assert oracle.vanilla(eps_pred, eps).dtype == np.float64
    assert oracle.batch_mean(oracle.vanilla(eps_pred, eps)) == 2.625


def test_shapes_never_broadcast():
    with pytest.raises(ValueError, match="shapes differ"):
        oracle.vanilla(np.zeros((2, 3)), np.zeros((1, 3)))
    with pytest.raises(ValueError, match="gamma and sigma"):
        oracle.implied_noise(X_T, A, 0.6, 0.8)
    with pytest.raises(ValueError, match="neighbors"):
        oracle.retrack_posterior(X_T, np.zeros((2, 1, 2)), GAMMA, SIGMA)


def test_siss_by_hand():
    close(oracle.implied_noise(X_T, A, GAMMA, SIGMA), [[2.0, 1.0]])
    close(oracle.implied_noise(X_T, F, GAMMA, SIGMA), [[1.0, 1.0]])
    w_a, w_f = oracle.siss_weights(X_T, A, F, GAMMA, SIGMA, 0.5)
    close(w_a, [2.0 * SMALL])
    close(w_f, [2.0 * LARGE])
    main, correction = oracle.siss(ZERO, X_T, A, F, GAMMA, SIGMA, 0.5)
    close(main, [1.8242552380635635])
    close(correction, [3.2702979047745747])
    main, correction = oracle.siss_grad(ZERO, X_T, A, F, GAMMA, SIGMA, 0.5)
    close(main, [[-8.0 * SMALL, -4.0 * SMALL]])
    close(correction, [[-4.0 * LARGE, -4.0 * LARGE]])


@pytest.mark.parametrize(
    ("mixture", "w_a", "w_f"),
    [
        (0.0, 1.0, 4.4816890703380645),
        (1.0, 0.22313016014842982, 1.0),
        (0.25, 1.0 / (0.75 + 0.25 * 4.4816890703380645), 1.0 / (0.75 * 0.22313016014842982 + 0.25)),
    ],
)
def test_siss_weights_at_other_mixtures(mixture, w_a, w_f):
    actual_a, actual_f = oracle.siss_weights(X_T, A, F, GAMMA, SIGMA, mixture)
    close(actual_a, [w_a])
    close(actual_f, [w_f])
    close((1.0 - mixture) * actual_a + mixture * actual_f, [1.0])  # (1 - lambda) w_a + lambda w_f = 1


@pytest.mark.parametrize(
    ("mixture", "at_remain", "at_forget"),
    [(0.0, (1.0, 0.0), (1.0, math.inf)), (0.5, (2.0, 0.0), (0.0, 2.0)), (1.0, (math.inf, 1.0), (0.0, 1.0))],
)
def test_siss_weights_of_far_pairs(mixture, at_remain, at_forget):
    """d_a - d_f is near 1e8: exp overflows, and no weight, loss or gradient may be NaN."""
    gamma, sigma = np.array([1.0]), np.array([1e-4])
    for x_t, expected in ((A, at_remain), (F, at_forget)):
        weights = oracle.siss_weights(x_t, A, F, gamma, sigma, mixture)
        close(np.concatenate(weights), expected)
        values = oracle.siss(ZERO, x_t, A, F, gamma, sigma, mixture)
        grads = oracle.siss_grad(ZERO, x_t, A, F, gamma, sigma, mixture)
        assert not np.isnan(np.concatenate(values)).any()
        assert not np.isnan(np.concatenate(grads)).any()
    log_w_a, log_w_f = oracle.siss_log_weights(F, A, F, gamma, sigma, 0.0)
    close(log_w_a, [0.0])
    close(log_w_f, [(16 / 9) / 2e-8])


@pytest.mark.parametrize("mixture", [0.0, 0.3, 1.0])
def test_siss_weights_of_the_same_image_are_one(mixture):
    close(np.concatenate(oracle.siss_weights(X_T, A, A, GAMMA, SIGMA, mixture)), [1.0, 1.0])


@pytest.mark.parametrize("mixture", [0.0, 0.3, 0.5, 1.0])
def test_siss_is_unbiased(mixture):
    """Over the mixture's x_t, main has the mean of |e - eps|^2 under a, correction that under f: 1 + e^2."""
    gamma, sigma, a, f, e = 0.6, 0.8, -0.5, 0.7, 0.4
    grid = np.linspace(-12.0, 12.0, 2001)
    density_a = np.exp(-0.5 * ((grid - gamma * a) / sigma) ** 2) / (sigma * math.sqrt(2.0 * math.pi))
    density_f = np.exp(-0.5 * ((grid - gamma * f) / sigma) ** 2) / (sigma * math.sqrt(2.0 * math.pi))
    mixed = (1.0 - mixture) * density_a + mixture * density_f
    ones = np.ones(len(grid))
    main, correction = oracle.siss(
        e * ones[:, None],
        grid[:, None],
        a * ones[:, None],
        f * ones[:, None],
        gamma * ones,
        sigma * ones,
        mixture,
    )
    spacing = grid[1] - grid[0]
    close(np.sum(mixed * main) * spacing, 1.0 + e * e, rtol=1e-9)
    close(np.sum(mixed * correction) * spacing, 1.0 + e * e, rtol=1e-9)


def test_siss_no_is_is_two_plain_losses():
    main, correction = oracle.siss_no_is(ZERO, X_T, A, F)
    close(main, [2.0])
    close(correction, [16 / 9])
    main, correction = oracle.siss_no_is_grad(ZERO, X_T, A, F)
    close(main, [[-2.0, -2.0]])
    close(correction, [[-8 / 3, 0.0]])


def test_retrack_by_hand():
    neighbors = np.stack([A, F], axis=1)
    arguments = (X_T, neighbors, GAMMA, SIGMA)
    close(oracle.retrack_posterior(*arguments), [[SMALL, LARGE]])
    close(oracle.retrack_posterior(*arguments), [[0.18242552380635635, 0.8175744761936437]])
    close(oracle.retrack(ZERO, *arguments), [5.0 * SMALL + 2.0 * LARGE])
    close(oracle.retrack_target(*arguments), [[1.0 + SMALL, 1.0]])
    close(oracle.retrack_constant(*arguments), [SMALL * LARGE])
    close(oracle.retrack_grad(ZERO, *arguments), [[-2.0 - 2.0 * SMALL, -2.0]])
    assert oracle.retrack_objective([3.0, 5.0], [1.0, 2.0, 3.0], 0.25) == 2.5


def test_one_neighbor_is_a_plain_loss():
    close(oracle.retrack_posterior(X_T, A[:, None], GAMMA, SIGMA), [[1.0]])
    close(oracle.retrack(ZERO, X_T, A[:, None], GAMMA, SIGMA), [5.0])
    close(oracle.retrack_constant(X_T, A[:, None], GAMMA, SIGMA), [0.0])


@pytest.mark.parametrize("pixels", [784, 3072])
@pytest.mark.parametrize("time", [0, 999])
def test_posterior_to_60_digits(pixels, time):
    """Two near neighbors among far ones, whose logits reach -1e7: the near ones' weights stay precise."""
    rng = np.random.default_rng(pixels + time)
    gamma, sigma = record.schedule([time])
    forget = rng.uniform(-1.0, 1.0, (1, pixels))
    spread = min(sigma[0] / gamma[0], 1.0) / math.sqrt(pixels)
    near = forget + spread * rng.standard_normal((2, pixels))
    far = rng.uniform(-1.0, 1.0, (2, pixels))
    neighbors = np.concatenate([far[:1], near, far[1:]])[None].astype(np.float32)
    x_t = (gamma * forget + sigma * rng.standard_normal((1, pixels))).astype(np.float32)
    exact = oracle.retrack_posterior_decimal(x_t, neighbors, gamma, sigma)
    close(oracle.retrack_posterior(x_t, neighbors, gamma, sigma), exact, rtol=1e-9, atol=0.0)
    close(exact.sum(), 1.0)
    if time == 0:
        assert exact[0, 0] == exact[0, 3] == 0.0
    assert 0.01 < exact[0, 1] < 0.99


def test_one_weighted_target_is_the_same_loss():
    case = record.load()["retrack"]["in"]
    without_prediction = {k: v for k, v in case.items() if k != "eps_pred"}
    target = oracle.retrack_target(**without_prediction)
    constant = oracle.retrack_constant(**without_prediction)
    close(oracle.squared_error(case["eps_pred"], target) + constant, oracle.retrack(**case))
    close(oracle.squared_error_grad(case["eps_pred"], target), oracle.retrack_grad(**case))


def test_gradients_by_finite_differences():
    rng = np.random.default_rng(3)
    x_t, eps_pred, remain, forget = rng.standard_normal((4, 2, 2, 2, 1))
    neighbors = rng.standard_normal((2, 3, 2, 2, 1))
    gamma, sigma = np.array([0.6, 0.9]), np.array([0.8, 0.4])
    pair = (x_t, remain, forget, gamma, sigma, 0.3)
    around = (x_t, neighbors, gamma, sigma)

    def check(function, gradient):
        close(gradient, central_difference(lambda e: function(e).sum(), eps_pred), rtol=1e-7, atol=1e-7)

    check(lambda e: oracle.vanilla(e, x_t), oracle.vanilla_grad(eps_pred, x_t))
    check(lambda e: oracle.neggrad(e, x_t), oracle.neggrad_grad(eps_pred, x_t))
    check(lambda e: oracle.erasediff(e, x_t), oracle.erasediff_grad(eps_pred, x_t))
    check(lambda e: oracle.retrack(e, *around), oracle.retrack_grad(eps_pred, *around))
    for term in (0, 1):
        check(lambda e, i=term: oracle.siss(e, *pair)[i], oracle.siss_grad(eps_pred, *pair)[term])
    check(
        lambda e: oracle.siss_no_is(e, x_t, remain, forget)[0],
        oracle.siss_no_is_grad(eps_pred, x_t, remain, forget)[0],
    )


def test_mean_noise_of_two_points_is_a_tanh():
    """Remain set {+1, -1} in one dimension: E[a | x] = tanh(gamma x / sigma^2)."""
    x_t = np.array([[-2.0], [0.0], [0.1], [3.0]])
    gamma, sigma = np.full(4, 0.6), np.full(4, 0.8)
    expected = (x_t - 0.6 * np.tanh(0.6 * x_t / 0.64)) / 0.8
    close(oracle.remain_mean_noise(x_t, np.array([[1.0], [-1.0]]), gamma, sigma), expected)


def test_all_of_the_remain_set_as_neighbors_is_exact():
    case = record.load()["exact_remain"]["in"]
    neighbors = np.repeat(case["remain"][None], len(case["x_t"]), axis=0)
    target = oracle.retrack_target(case["x_t"], neighbors, case["gamma"], case["sigma"])
    close(target, oracle.remain_mean_noise(**case), rtol=1e-11)


def test_combined_gradients_by_hand():
    # <g_R, g_c> / |g_c|^2 = -3, so the coefficient is 0.5 + 3.
    close(oracle.combine_erasediff([3.0, 4.0], [-1.0, 0.0], 0.5), [-0.5, 4.0])
    # It is 1.5, above eta: nothing to add.
    close(oracle.combine_erasediff([3.0, 4.0], [2.0, 0.0], 0.5), [3.0, 4.0])
    close(oracle.combine_siss([1.0, 2.0], [3.0, 4.0], 10.0), [-5.0, -6.0])
    close(oracle.combine_retrack([4.0, 0.0], [0.0, 8.0], 0.25), [1.0, 6.0])
    close(oracle.combine_erasediff([3.0, 4.0], [0.0, 0.0], 0.5), [3.0, 4.0])
    close(oracle.combine_siss([3.0, 4.0], [0.0, 0.0], 10.0), [3.0, 4.0])


def test_erasediff_keeps_its_descent_and_siss_its_norm():
    """<g, g_c> >= eta |g_c|^2, with equality where the constraint acts; SISS's added term has the norm s."""
    rng = np.random.default_rng(4)
    for _ in range(20):
        g_r, g_c = rng.standard_normal((2, 7))
        descent = oracle.combine_erasediff(g_r, g_c, 0.1) @ g_c / (g_c @ g_c)
        close(descent, max(0.1, g_r @ g_c / (g_c @ g_c)), rtol=1e-10)
        added = g_r - oracle.combine_siss(g_r, g_c, 5.0)
        close(oracle.global_norm(added), 5.0)
        assert added @ g_c > 0.0


def test_clipping_by_hand():
    close(oracle.clip_global_norm([3.0, 4.0], 1.0), [0.6, 0.8])
    close(oracle.clip_global_norm([0.3, 0.4], 1.0), [0.3, 0.4])
    close(oracle.clip_global_norm([0.0, 0.0], 1.0), [0.0, 0.0])
    close(oracle.clip_global_norm([3.0, 4.0], 1.0, epsilon=1.0), [0.5, 4 / 6])


def test_adamw_by_hand():
    settings = {"lr": 0.1, "betas": (0.5, 0.75), "eps": 0.5, "weight_decay": 0.01}
    # Step 1: the unbiased moments are g and g^2, so 2 (1 - 0.001) - 0.1 * 0.5 / (0.5 + 0.5) = 1.948.
    params, first, second = oracle.adamw_step([2.0], [0.5], [0.0], [0.0], 1, **settings)
    close([params, first, second], [[1.948], [0.25], [0.0625]])
    # Step 2, g = -1: m = -0.375, over 0.75 is -0.5; v = 0.296875, over 0.4375 is 0.678571.
    params, first, second = oracle.adamw_step(params, [-1.0], first, second, 2, **settings)
    close([first, second], [[-0.375], [0.296875]])
    close(params, [1.946052 + 0.05 / (0.8237544709 + 0.5)], rtol=1e-10)
    # Without a gradient only the decay is left, and it does not enter the moments.
    params, first, second = oracle.adamw_step([2.0], [0.0], [0.0], [0.0], 1, **settings)
    close([params, first, second], [[1.998], [0.0], [0.0]])


def test_recorded_arrays_are_what_the_oracle_gives():
    recorded = record.load()
    assert set(recorded) == set(record.make_inputs())
    for case, sides in recorded.items():
        expected = record.outputs(case, sides["in"])
        assert set(expected) == set(sides["out"]), case
        for name, value in expected.items():
            assert np.isfinite(value).all(), (case, name)
            np.testing.assert_allclose(sides["out"][name], value, rtol=1e-10, err_msg=f"{case} {name}")
    assert record.PATH.stat().st_size < 300_000
