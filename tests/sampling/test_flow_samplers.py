"""Euler's and Heun's method on a flow of Gaussian data, whose velocity is exact, and against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.sampling import initial_noise, make_sampler, num_calls, sample

MEAN, STD = 0.3, 0.5
RNGS = jax.random.split(jax.random.key(0), 8)
START = initial_noise(RNGS, (16,))


def velocity(x, time):
    """E[eps - x_0 | x_t] for data N(mean, std^2), at T sigma = `time` [B]."""
    t = time[:, None] / 1000
    gain = (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2)
    return gain * (x - (1 - t) * MEAN) - MEAN


def drawn(name, num_steps, shift=1.0, eps_fn=velocity):
    sampler = make_sampler(name, Schedule.rectified_flow(shift=shift), num_steps)
    return np.float64(jax.jit(lambda x: sample(eps_fn, x, RNGS, sampler))(START))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_samples_are_the_data(shift):
    """From t = 1 the exact flow takes noise z to mean + std z; at 50 steps Euler misses it by a few percent, Heun by less."""
    exact = MEAN + STD * np.float64(START)
    errors = {name: np.abs(drawn(name, 50, shift) - exact).max() for name in ("flow_euler", "flow_heun")}
    assert errors["flow_heun"] < 0.01 and errors["flow_euler"] < 0.15 and errors["flow_heun"] < 0.3 * errors["flow_euler"]


@pytest.mark.parametrize(("name", "order"), [("flow_euler", 1), ("flow_heun", 2)])
def test_order_of_convergence(name, order):
    """Heun's last step is Euler's, over a length of 1/1000 of the path whatever the number of steps: it adds a constant error."""
    exact, steps = MEAN + STD * np.float64(START), (8, 16, 32)
    errors = [np.abs(drawn(name, num_steps) - exact).max() for num_steps in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert order - 0.25 < slope < order + 0.35, (errors, slope)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", ["flow_euler", "flow_heun"])
def test_equals_the_method_in_plain_loops(name, shift):
    """Float64, lists and ifs, on a velocity that is not linear; the network is called with T sigma, at num_calls places."""
    num_steps = 7

    def moved(s):
        return shift * s / (1 + (shift - 1) * s)

    places = np.linspace(1.0, moved(1 / 1000), num_steps)
    sigmas = [*(moved(s) for s in places), 0.0]
    x, calls = np.float64(START), 0
    for now, then in zip(sigmas, sigmas[1:], strict=False):
        first = np.tanh(x + now)
        trial, calls = x + (then - now) * first, calls + 1
        if name == "flow_heun" and then > 0:
            trial, calls = x + (then - now) * (first + np.tanh(trial + then)) / 2, calls + 1
        x = trial
    found = drawn(name, num_steps, shift, lambda x, time: jnp.tanh(x + time[:, None] / 1000))
    np.testing.assert_allclose(found, x, rtol=1e-5, atol=1e-5)
    assert num_calls(make_sampler(name, Schedule.rectified_flow(shift=shift), num_steps)) == calls
