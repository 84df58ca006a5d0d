"""The likelihood by the own ODE of a flow and of EDM, on Gaussian data whose velocity and eps are exact."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.metrics.likelihood import nll_bits_per_dim

DIM = 16


def velocity(std, x, time):
    t = (time / 1000)[:, None, None, None]
    return (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2) * x


def noise(std, x, sigma):
    sigma = sigma[:, None, None, None]
    return sigma / (std**2 + sigma**2) * x


def gaussian(std):
    """Returns (three images from N(0, std^2), their bits/dim)."""
    x = np.random.default_rng(0).normal(size=(3, 4, 4, 1)) * std
    log_p = -0.5 * (x**2 / std**2 + math.log(2 * math.pi * std**2)).sum(axis=(1, 2, 3))
    return x, -log_p / (DIM * math.log(2)) + 7


@pytest.mark.parametrize("std", [0.5, 0.1])
def test_gaussian_data_has_the_known_answer(std, rng):
    """Any shift has the same ODE: it moves where the network is trained, not the path."""
    x, expected = gaussian(std)
    for shift in (1.0, 3.0):
        bits, _ = nll_bits_per_dim(velocity, jnp.float32(std), Schedule.rectified_flow(shift=shift), x, rng)
        np.testing.assert_allclose(bits, expected, atol=5e-4)


@pytest.mark.parametrize("std", [0.5, 0.1])
def test_gaussian_data_has_the_known_answer_on_edms_schedule(std, rng):
    """But for the noise of sigma_min at the start and the variance of the data, which N(0, sigma_max^2) leaves out."""
    x, expected = gaussian(std)
    bits, _ = nll_bits_per_dim(noise, jnp.float32(std), Schedule.edm(), x, rng)
    np.testing.assert_allclose(bits, expected, atol=1e-3)
