"""Redirection and the other methods on a rectified flow, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrack_jax.api import unlearn
from retrack_jax.checks import UserError
from retrack_jax.data.dataset import pixels_to_model
from retrack_jax.diffusion.conversions import make_eps_fn
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.metrics.membership import denoising_losses, secmi_scores
from retrack_jax.parallel import example_rngs
from retrack_jax.unlearn import losses
from retrack_jax.unlearn.methods import METHODS
from retrack_jax.unlearn.options import MethodOptions, RetrackOptions
from retrack_jax.unlearn.streams import Context, Stream
from tests import toys

FLOW, NONE = Schedule.rectified_flow(), MethodOptions()


def marginal_velocity(x_t, t, images):
    """E[eps - x_0 | x_t] over equally likely `images` [N, D], for one point [D]: float64, by Bayes' rule."""
    x_t, images = np.float64(x_t), np.float64(images)
    noises = (x_t - (1 - t) * images) / t
    log_weights = -0.5 * np.square(noises).sum(axis=1)
    weights = np.exp(log_weights - log_weights.max())
    weights /= weights.sum()
    return weights @ (noises - images)


@pytest.mark.parametrize("t", [0.02, 0.3, 0.7, 0.95, 1.0])
def test_with_all_remaining_images_the_target_is_the_marginal_velocity(t):
    draw = np.random.default_rng(0)
    images = draw.uniform(-1, 1, (12, 6))
    x_t = (1 - t) * draw.uniform(-1, 1, (3, 6)) + t * draw.normal(size=(3, 6))
    neighbors = np.broadcast_to(images, (3, 12, 6))
    gamma, sigma = jnp.full(3, 1 - t, jnp.float32), jnp.full(3, t, jnp.float32)
    given = jnp.float32(x_t), jnp.float32(neighbors), gamma, sigma
    target, _ = losses.retrack_target(*given, c=FLOW.clean_weight(gamma))
    expected = [marginal_velocity(x, np.float64(np.float32(t)), images) for x in np.float32(x_t)]
    np.testing.assert_allclose(target, expected, rtol=2e-5, atol=2e-5)
    # The loss is the published one, with a target for each neighbor.
    prediction = jnp.float32(draw.normal(size=(3, 6)))
    p = np.float64(losses.retrack_posterior(*given))
    by_hand = [
        sum(p[i, k] * np.square(np.float64(prediction)[i] - (x_t[i] - images[k]) / t).sum() for k in range(12)) for i in range(3)
    ]
    np.testing.assert_allclose(losses.retrack(prediction, *given, c=FLOW.clean_weight(gamma)), by_hand, rtol=1e-4)


def test_the_posterior_is_that_of_a_diffusion_at_the_same_ratio():
    """x/sqrt(gamma^2 + sigma^2) is a point of the variance-preserving path with the same gamma/sigma."""
    draw = np.random.default_rng(1)
    neighbors = jnp.float32(draw.uniform(-1, 1, (4, 5, 8)))
    t = np.array([0.1, 0.4, 0.8, 0.99])
    x_t = (1 - t)[:, None] * draw.uniform(-1, 1, (4, 8)) + t[:, None] * draw.normal(size=(4, 8))
    norm = np.sqrt((1 - t) ** 2 + t**2)
    of_flow = losses.retrack_posterior(jnp.float32(x_t), neighbors, jnp.float32(1 - t), jnp.float32(t))
    scaled = jnp.float32(x_t / norm[:, None]), neighbors, jnp.float32((1 - t) / norm), jnp.float32(t / norm)
    np.testing.assert_allclose(of_flow, losses.retrack_posterior(*scaled), rtol=1e-4, atol=1e-6)


def context(params, options=NONE, **fields):
    eps_fn = make_eps_fn(toys.ToyNet().apply, FLOW)
    return Context(schedule=FLOW, eps_fn=lambda x, t, c, rngs: eps_fn(params, x, t), options=options, **{"t_max": 1000, **fields})


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("row", [0, 999])
def test_every_method_is_finite_at_the_ends_of_the_path(name, row, rng):
    method = METHODS[name]
    given = toys.streams_of(method, rng)

    def loss(params):
        terms = method.terms(context(params, method.options(), t_min=row, t_max=row + 1), *given)
        return terms.main + (0.0 if terms.correction is None else terms.correction)

    value, grads = jax.value_and_grad(loss)(toys.params())
    assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_the_loss_of_remaining_images_is_that_of_rectified_flow(rng):
    """||u - (eps - x_0)||^2 summed over pixels, and 1/(1 - t)^2 times the loss of the eps that u stands for."""
    remain, _ = toys.streams(rng)
    here = context(toys.params())
    points = here.noise(remain)
    (velocity,) = here.predict(points)
    found = here.retain_loss(velocity, points)
    u, x_0, eps, x_t = (np.float64(one) for one in (velocity, remain.x_0, points.eps, points.x_t))
    t = np.float64(points.sigma)[:, None, None, None]
    np.testing.assert_allclose(x_t, (1 - t) * x_0 + t * eps, atol=1e-6)
    np.testing.assert_allclose(found, np.square(u - (eps - x_0)).sum(axis=(1, 2, 3)), rtol=1e-5)
    of_eps = np.square(x_t + (1 - t) * u - eps).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(found, of_eps / (1 - t[:, 0, 0, 0]) ** 2, rtol=1e-3)


def test_the_terms_of_retrack_and_siss_have_velocity_targets(rng):
    remain, forget = toys.streams(rng)
    here = context(toys.params(), RetrackOptions(lam=1.0))
    points = here.noise(forget)
    (velocity,) = here.predict(points)
    terms = METHODS["retrack"].terms(here, remain, forget)
    p = np.float64(losses.retrack_posterior(points.x_t, forget.neighbors, points.gamma, points.sigma))
    t = np.float64(points.sigma)[:, None, None, None, None]
    targets = (np.float64(points.x_t)[:, None] - np.float64(forget.neighbors)) / t
    each = np.square(np.float64(velocity)[:, None] - targets).sum(axis=(2, 3, 4))
    np.testing.assert_allclose(terms.main, (p * each).sum(axis=1).mean(), rtol=1e-4)

    a, f, sigma = np.float64(remain.x_0), np.float64(forget.x_0), t[:, 0]
    main, correction = losses.siss(velocity, points.x_t, remain.x_0, forget.x_0, points.gamma, points.sigma, 0.5, None, points.c)
    weights = losses.siss_weights(points.x_t, remain.x_0, forget.x_0, points.gamma, points.sigma, 0.5)
    for found, weight, clean in zip((main, correction), weights, (a, f), strict=True):
        squares = np.square(np.float64(velocity) - (np.float64(points.x_t) - clean) / sigma).sum(axis=(1, 2, 3))
        np.testing.assert_allclose(found, np.float64(weight) * squares, rtol=1e-4)


def test_logit_normal_times(rng):
    """Half of the draws lie below the middle of the window, and 68% within one deviation of the logit."""
    stream = Stream(jnp.zeros((4000, 1, 1, 1)), example_rngs(rng, jnp.arange(4000)))
    t = np.asarray(context({}, t_min=200, t_max=1000, logit_normal=(0.0, 0.5)).noise(stream).t)
    assert t.min() >= 200 and t.max() < 1000
    place = (t + 0.5 - 200) / 800
    assert abs(np.median(place) - 0.5) < 0.02
    logit = np.log(place / (1 - place))
    assert abs(np.mean(np.abs(logit) < 0.5) - 0.683) < 0.03


def test_a_user_unlearns_on_a_flow_and_the_metrics_of_memory_have_values(rng):
    how = {"num_steps": 2, "batch_size": 8, "num_neighbors": 4, "logit_normal": (0.0, 1.0), "t_min": 5}
    before = toys.params()
    after = unlearn(toys.ToyNet().apply, before, FLOW, toys.images(20), toys.images(2, 1), rng=rng, **how)
    assert 0 < toys.relative(after, before) < 1
    eps_fn, images = make_eps_fn(toys.ToyNet().apply, FLOW), pixels_to_model(toys.images(2, 1))
    assert np.isfinite(denoising_losses(eps_fn, after, FLOW, images, rng, num_noises=4)).all()
    assert np.isfinite(secmi_scores(eps_fn, after, FLOW, images)).all()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"t_min": 0.02}, "t_min is 0.02; it must be a whole number"),
        ({"t_max": 1001}, "t_max is 1001"),
        ({"logit_normal": (0.0,)}, "logit_normal is .*two numbers"),
        ({"logit_normal": (0.0, 0.0)}, "the second of logit_normal is 0.0"),
    ],
)
def test_times_outside_the_path_are_refused(option, message, rng):
    with pytest.raises(UserError, match=message):
        unlearn(toys.ToyNet().apply, toys.params(), FLOW, toys.images(20), toys.images(2, 1), rng=rng, **option)
