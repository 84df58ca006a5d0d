"""A network that predicts v or the sample unlearns exactly as the same network that predicts eps: losses see eps alone."""

import functools

import jax
import numpy as np
import pytest

from retrack_jax.api import unlearn
from retrack_jax.diffusion.schedule import Schedule
from tests import toys


@functools.cache
def update(method: str, prediction_type: str):
    """The change of the parameters; Adam's eps is so large that it follows the gradient, not its sign."""
    schedule = Schedule.from_config(toys.schedule().to_config() | {"prediction_type": prediction_type})

    def apply(variables, x_t, t, **more):
        eps = toys.ToyNet().apply(variables, x_t, t, **more)
        gamma, sigma = (table[t][:, None, None, None] for table in (schedule.gamma, schedule.sigma))
        return {"epsilon": eps, "v_prediction": (eps - sigma * x_t) / gamma, "sample": (x_t - sigma * eps) / gamma}[
            schedule.prediction_type
        ]

    before = toys.params()
    options = dict(num_steps=2, batch_size=8, learning_rate=1.0, eps=1e3, weight_decay=0.0, rng=jax.random.key(0))
    options |= {"num_neighbors": 4} if method == "retrack" else {}
    after = unlearn(apply, before, schedule, toys.images(20), toys.images(2, 1), method=method, **options)
    return jax.tree.map(lambda new, old: np.float64(new) - np.float64(old), after, before)


@pytest.mark.parametrize(
    ("method", "prediction_type"), [("retrack", "v_prediction"), ("retrack", "sample"), ("siss", "v_prediction")]
)
def test_the_update_is_that_of_the_eps_network(method, prediction_type):
    assert toys.relative(update(method, prediction_type), update(method, "epsilon")) < 1e-3
