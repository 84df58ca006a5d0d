"""Redirection and the other methods on EDM's schedule, against NumPy in float64."""

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

EDM, NONE = Schedule.edm(), MethodOptions()
ENDS = [0, 999]


def points(sigma, count=12, size=6):
    """Returns (x_t [3, size], the images that they may come from [count, size], sigma [3]), NumPy in float64."""
    draw = np.random.default_rng(0)
    images = draw.uniform(-1, 1, (count, size))
    return images[:3] + sigma * draw.normal(size=(3, size)), images, np.full(3, sigma)


def posterior(x_t, images, sigma):
    """p_k of equally likely `images` by Bayes' rule, [3, count]."""
    log_p = -0.5 * np.square((x_t[:, None] - images) / sigma[:, None, None]).sum(axis=2)
    p = np.exp(log_p - log_p.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def as_given(x_t, images, sigma):
    return jnp.float32(x_t), jnp.broadcast_to(jnp.float32(images), (3, *images.shape)), jnp.ones(3), jnp.float32(sigma)


@pytest.mark.parametrize("sigma", [0.002, 0.1, 0.8, 5.0, 80.0])
def test_with_all_remaining_images_the_target_is_the_posterior_mean(sigma):
    """x_t - sigma v_bar is E[x_0 | x_t] over the remaining images, at both ends of the schedule and between."""
    x_t, images, sigmas = points(sigma)
    target, spread = losses.retrack_target(*as_given(x_t, images, sigmas))
    mean = posterior(np.float64(np.float32(x_t)), images, sigmas) @ images
    np.testing.assert_allclose(target, (x_t - mean) / sigma, rtol=1e-4, atol=1e-4 + 1e-7 / sigma)
    assert np.isfinite(spread).all()


@pytest.mark.parametrize("sigma", [0.05, 0.5, 3.0, 80.0])
def test_the_posterior_is_that_of_betas_at_the_same_ratio(sigma):
    """x_t/sqrt(1 + sigma^2) is a point of the variance-preserving path with the same r = 1/sigma."""
    x_t, images, sigmas = points(sigma)
    norm = np.sqrt(1 + sigma**2)
    of_edm = losses.retrack_posterior(*as_given(x_t, images, sigmas))
    x, neighbors, gamma, scaled_sigma = as_given(x_t / norm, images, sigmas / norm)
    np.testing.assert_allclose(of_edm, losses.retrack_posterior(x, neighbors, gamma / norm, scaled_sigma), rtol=1e-4, atol=1e-6)


def context(params, kind=Context, options=NONE, **fields):
    eps_fn = make_eps_fn(toys.ToyNet().apply, EDM)
    return kind(schedule=EDM, eps_fn=lambda x, t, c, rngs: eps_fn(params, x, t), options=options, **{"t_max": 1000, **fields})


@pytest.mark.parametrize("name", ["retrack", "siss", "erasediff", "neggrad"])
def test_every_method_is_finite_at_both_ends(name, rng):
    method = METHODS[name]
    given = toys.streams_of(method, rng)

    def loss(params, row):
        terms = method.terms(context(params, options=method.options(), t_min=row, t_max=row + 1), *given)
        return terms.main + (0.0 if terms.correction is None else terms.correction)

    for row in ENDS:
        value, grads = jax.jit(jax.value_and_grad(loss), static_argnums=1)(toys.params(), row)
        assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


class Unweighted(Context):
    """The same with every loss in eps."""

    def noise(self, stream):
        return super().noise(stream).replace(weight=None)


@pytest.mark.parametrize("name", METHODS)
def test_the_terms_are_those_of_eps_times_the_weight(name, rng):
    """1 + (sigma/sigma_data)^2, in every method and term but EraseDiff's uniform noise; ReTrack's cap comes on top."""
    method = METHODS[name]
    given = toys.streams_of(method, rng)
    options = RetrackOptions(lam=0.3, snr_cap=0.5) if name == "retrack" else method.options()
    weighted, plain = (
        method.terms(context(toys.params(), kind=kind, options=options, t_min=600, t_max=601), *given)
        for kind in (Context, Unweighted)
    )
    weight = 1 + (np.float64(EDM.sigma[600]) / 0.5) ** 2
    assert weight > 1.5
    np.testing.assert_allclose(weighted.main, weight * plain.main, rtol=1e-5)
    if plain.correction is not None:
        factor = 1 if name == "erasediff" else weight
        np.testing.assert_allclose(weighted.correction, factor * plain.correction, rtol=1e-5)


def test_the_loss_of_remaining_images_is_that_of_the_networks_output(rng):
    """||F - F*||^2, F* = (x_0 - c_skip x_t)/c_out, summed over pixels, from what the network itself gives."""
    remain, _ = toys.streams(rng)
    here = context(toys.params())
    noised = here.noise(remain)
    (eps_pred,) = here.predict(noised)
    sigma = noised.sigma[:, None, None, None]
    s = jnp.sqrt(sigma**2 + 0.25)
    output = np.float64(toys.ToyNet().apply({"params": toys.params()}, noised.x_t / s, jnp.log(noised.sigma) / 4))
    x_0, x_t, sigma, s = (np.float64(each) for each in (remain.x_0, noised.x_t, sigma, s))
    np.testing.assert_allclose(x_t, x_0 + sigma * np.float64(noised.eps), rtol=1e-5, atol=1e-6)
    best = (x_0 - 0.25 / s**2 * x_t) / (0.5 * sigma / s)
    np.testing.assert_allclose(here.retain_loss(eps_pred, noised), np.square(output - best).sum(axis=(1, 2, 3)), rtol=1e-3)


def test_timesteps_are_drawn_log_normally_unless_told_otherwise(rng):
    stream = Stream(jnp.zeros((4000, 1, 1, 1)), example_rngs(rng, jnp.arange(4000)))

    def drawn(**fields):
        return np.asarray(context({}, **fields).noise(stream).t)

    for fields, mean, deviation in (({}, -1.2, 1.2), ({"log_normal": (0.5, 0.3)}, 0.5, 0.3)):
        log_sigma = np.log(EDM.sigma[drawn(**fields)])
        assert abs(np.median(log_sigma) - mean) < 0.08 and abs(np.std(log_sigma) - deviation) < 0.05
    assert abs(np.median(drawn(log_normal=())) - 500) < 25 and abs(np.median(drawn(logit_normal=(0.0, 0.5))) - 500) < 25
    window = drawn(t_min=700, t_max=720)
    assert window.min() >= 700 and window.max() < 720


def test_a_user_unlearns_with_a_network_of_edm_and_the_metrics_of_memory_have_values(rng):
    schedule = Schedule.edm(prediction_type="v_prediction", sigma_data=1.0)
    how = {"num_steps": 2, "batch_size": 8, "num_neighbors": 4, "log_normal": (-1.0, 1.0), "snr_cap": 5.0}
    before = toys.params()
    after = unlearn(toys.ToyNet().apply, before, schedule, toys.images(20), toys.images(2, 1), rng=rng, **how)
    assert 0 < toys.relative(after, before) < 1
    eps_fn, images = make_eps_fn(toys.ToyNet().apply, schedule), pixels_to_model(toys.images(2, 1))
    assert np.isfinite(denoising_losses(eps_fn, after, schedule, images, rng, num_noises=4)).all()
    assert np.isfinite(secmi_scores(eps_fn, after, schedule, images)).all()


@pytest.mark.parametrize(
    ("schedule", "option", "message"),
    [
        (EDM, {"log_normal": (0.0,)}, "log_normal is .*two numbers, the mean and the deviation of log.sigma."),
        (EDM, {"log_normal": (0.0, 0.0)}, "the second of log_normal is 0.0"),
        (EDM, {"log_normal": (0.0, 1.0), "logit_normal": (0.0, 1.0)}, "both set; choose one"),
        (Schedule(), {"log_normal": (0.0, 1.0)}, "log_normal is .*for EDM's sigmas, and the schedule is DDPMScheduler's"),
        (Schedule.rectified_flow(), {"log_normal": (0.0, 1.0)}, "the schedule is FlowMatchEulerDiscreteScheduler's"),
        (EDM, {"t_max": 1001}, "t_max is 1001"),
    ],
)
def test_draws_that_have_no_meaning_are_refused(schedule, option, message, rng):
    with pytest.raises(UserError, match=message):
        unlearn(toys.ToyNet().apply, toys.params(), schedule, toys.images(20), toys.images(2, 1), rng=rng, **option)
