"""The forward process and its conversions: inverses of one another, and exact on Gaussian data."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrack_jax.checks import UserError
from retrack_jax.diffusion import Schedule, add_noise, eps_to_x0, expand, make_eps_fn, to_eps

SCHEDULE = Schedule.create()


def draw(seed, shape=(2, 3, 4, 1)):
    return np.random.default_rng(seed).standard_normal((2, *shape)).astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(
    t=st.integers(0, 999),
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(["epsilon", "v_prediction", "sample"]),
)
def test_round_trips(t, seed, kind):
    """x_0, eps -> x_t -> the network's output of each kind -> eps -> x_0. Float32 errors grow by 1/gamma and 1/sigma, as they
    must.
    """
    x_0, eps = draw(seed)
    gamma_B, sigma_B = (np.full(2, table[t]) for table in (SCHEDULE.gamma, SCHEDULE.sigma))
    gamma, sigma = gamma_B[0], sigma_B[0]
    x_t = add_noise(x_0, eps, gamma_B, sigma_B)
    np.testing.assert_allclose(x_t, gamma * x_0 + sigma * eps, rtol=1e-5, atol=1e-6)
    output = {"epsilon": eps, "v_prediction": gamma * eps - sigma * x_0, "sample": x_0}[kind]
    back = to_eps(output, x_t, gamma_B, sigma_B, kind)
    np.testing.assert_allclose(back, eps, atol=3e-6 / (sigma if kind == "sample" else 1))
    np.testing.assert_allclose(eps_to_x0(eps, x_t, gamma_B, sigma_B), x_0, atol=3e-6 / gamma)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_make_eps_fn_gives_eps_whatever_the_network_predicts(kind):
    schedule = Schedule.create(prediction_type=kind)
    x_0, eps = draw(1)
    t = jnp.array([3, 700], jnp.int32)
    gamma, sigma = schedule.gamma[t], schedule.sigma[t]
    x_t = add_noise(x_0, eps, gamma, sigma)
    seen = []

    def apply_fn(variables, x, t, scale, *, deterministic):
        seen.append((variables, deterministic))
        outputs = {
            "epsilon": eps,
            "v_prediction": expand(gamma, x) * eps - expand(sigma, x) * x_0,
            "sample": x_0,
        }
        return scale * outputs[kind]

    result = make_eps_fn(apply_fn, schedule)({"w": 1}, x_t, t, 1.0, deterministic=True)
    assert seen == [({"params": {"w": 1}}, True)]
    np.testing.assert_allclose(result, eps, atol=2e-4)


def test_make_eps_fn_keeps_the_dtype_of_x_for_a_bfloat16_network():
    for kind in ("epsilon", "v_prediction"):
        eps_fn = make_eps_fn(lambda variables, x, t: x.astype(jnp.bfloat16), Schedule.create(prediction_type=kind))
        assert eps_fn({}, jnp.ones((2, 3)), jnp.array([0, 5])).dtype == jnp.float32


def test_unknown_prediction_type():
    with pytest.raises(UserError, match="did you mean 'epsilon'"):
        to_eps(jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.ones(1), jnp.ones(1), "epsilom")


def test_works_for_any_trailing_shape():
    for shape in ((5,), (5, 7), (5, 2, 2, 2, 2)):
        assert add_noise(jnp.ones(shape), jnp.ones(shape), jnp.ones(5), jnp.ones(5)).shape == shape
