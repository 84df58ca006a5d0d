"""Relearning curves with training passed in as plain functions."""

import math

import pytest

from retrack_jax.checks import Diverged
from retrack_jax.metrics.relearning import relearning_curve, relearning_steps


def test_measures_before_and_after_each_stretch_of_training():
    calls = []

    def train(state, first_step, num_steps):
        calls.append((first_step, num_steps))
        return state + num_steps

    curve = relearning_curve(train, lambda state: state / 10, 5, (2, 5, 10))
    assert calls == [(0, 2), (2, 3), (5, 5)]
    assert curve == ([0, 2, 5, 10], [0.5, 0.7, 1.0, 1.5])


def test_steps_are_interpolated_and_censored():
    curve = (0, 10, 20), (5.0, 4.0, 2.0)
    assert relearning_steps(*curve, 3.0) == (pytest.approx(15.0), False)
    assert relearning_steps(*curve, 1.5) == relearning_steps(*curve, 1.0) == (20.0, True)
    assert relearning_steps(*curve, 5.0) == (0.0, False)


def test_a_loss_that_is_not_finite_is_refused():
    with pytest.raises(Diverged, match="not finite"):
        relearning_curve(lambda s, a, n: math.nan, float, 0, (5,))
