"""Relearning curves with training passed in as plain functions."""

import math

import pytest

from retrack_jax.checks import UserError
from retrack_jax.metrics.relearning import RelearningCurve, relearning_curve, relearning_steps


def test_measures_before_and_after_each_stretch_of_training():
    calls = []

    def train(state, first_step, num_steps):
        calls.append((first_step, num_steps))
        return state + num_steps

    curve = relearning_curve(train, lambda state: state / 10, 5, (2, 5, 10))
    assert calls == [(0, 2), (2, 3), (5, 5)]
    assert curve == RelearningCurve((0, 2, 5, 10), (0.5, 0.7, 1.0, 1.5))


def test_steps_are_interpolated_and_censored():
    curve = RelearningCurve((0, 10, 20), (5.0, 4.0, 2.0))
    assert relearning_steps(curve, 3.0).steps == pytest.approx(15.0)
    assert not relearning_steps(curve, 3.0).censored
    assert relearning_steps(curve, 1.5) == relearning_steps(curve, 1.0)
    assert relearning_steps(curve, 1.5).censored and relearning_steps(curve, 1.5).steps == 20.0
    assert relearning_steps(curve, 5.0).steps == 0.0


def test_refuses():
    with pytest.raises(UserError, match="must rise"):
        relearning_curve(lambda s, a, n: s, float, 0, (5, 5))
    with pytest.raises(UserError, match="must rise"):
        relearning_curve(lambda s, a, n: s, float, 0, (0,))
    with pytest.raises(UserError, match="not finite"):
        relearning_curve(lambda s, a, n: math.nan, float, 0, (5,))
