"""Injection: the exact score gives the posterior of the image; a model of one image gives that image back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrack_jax.checks import UserError
from retrack_jax.diffusion import Schedule, expand
from retrack_jax.sampling import inject

SCHEDULE = Schedule.create(clip_sample=False)


def eps_fn_of(mean, std):
    def eps_fn(x, t):
        gamma, sigma = expand(SCHEDULE.gamma[t], x), expand(SCHEDULE.sigma[t], x)
        return sigma * (x - gamma * mean) / (gamma**2 * std**2 + sigma**2)

    return eps_fn


def test_a_model_of_one_image_gives_it_back():
    memorized = jnp.linspace(-0.8, 0.8, 16).reshape(1, 4, 4, 1)
    rngs = jax.random.split(jax.random.key(0), 3)
    forget = jnp.zeros((3, 4, 4, 1))
    out = jax.jit(lambda x: inject(eps_fn_of(jnp.repeat(memorized, 3, 0), 0.0), x, rngs, SCHEDULE))(forget)
    np.testing.assert_allclose(out, np.repeat(memorized, 3, 0), atol=1e-4)


def test_gaussian_data_gives_the_known_mean_and_std():
    """x_t of an image a at t = 250, then the exact reverse process: N(k a + (1 - gamma k) mean, ...), with k = gamma std²/(gamma²
    std² + sigma²).
    """
    mean, std, image, t = 0.2, 0.5, 0.9, 250
    gamma, sigma = float(SCHEDULE.gamma[t]), float(SCHEDULE.sigma[t])
    variance = gamma**2 * std**2 + sigma**2
    gain = gamma * std**2 / variance
    expected_mean = mean + gain * (gamma * image - gamma * mean)
    expected_std = np.sqrt((gain * sigma) ** 2 + std**2 * sigma**2 / variance)
    rngs = jax.random.split(jax.random.key(1), 2048)
    samples = np.asarray(jax.jit(lambda x: inject(eps_fn_of(mean, std), x, rngs, SCHEDULE))(jnp.full((2048, 16), image)))
    assert abs(samples.mean() - expected_mean) < 0.002 + 4 * expected_std / np.sqrt(samples.size)
    assert abs(samples.std() - expected_std) < 0.01 * expected_std + 4 * expected_std / np.sqrt(2 * samples.size)


def test_calls_the_network_once_a_timestep():
    seen = []

    def eps_fn(x, t):
        jax.debug.callback(lambda t: seen.append(int(t)), t[0], ordered=True)
        return 0.1 * x

    jax.block_until_ready(inject(eps_fn, jnp.ones((1, 2)), jax.random.split(jax.random.key(0), 1), Schedule.create()))
    jax.effects_barrier()
    assert seen == list(range(250, -1, -1))


def test_t_outside_the_schedule():
    with pytest.raises(UserError, match="injection timestep is 1000"):
        inject(
            lambda x, t: x,
            jnp.ones((1, 2)),
            jax.random.split(jax.random.key(0), 1),
            Schedule.create(),
            t=1000,
        )
