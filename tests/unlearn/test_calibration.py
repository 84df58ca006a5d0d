"""How far to go from the pretrained to the unlearned parameters."""

import numpy as np
import pytest

from retrack_jax.unlearn.calibration import LARGEST, between, line_search


@pytest.mark.parametrize(("reference", "alpha"), [(6.0, 0.5), (11.0, 0.7071), (27.0, 1.118), (50.0, 1.5330)])
def test_the_loss_of_a_quadratic_is_reached(reference, alpha):
    """loss = 1 + 20 alpha^2 or, where alpha is above 1, what it is there."""
    found = line_search(lambda a: 1 + 20 * a**2 + 2 * max(0.0, a - 1), reference)
    assert found["alpha"] == pytest.approx(alpha, abs=0.05) and found["loss"] == pytest.approx(reference, rel=0.02)
    assert found["reference"] == reference and [found["alpha"], found["loss"]] in found["curve"]
    assert found["curve"] == sorted(found["curve"]) and found["curve"][0] == [0.0, 1.0] and len(found["curve"]) < 12


def test_a_curve_with_a_dip_ends_at_the_reference():
    found = line_search(lambda a: 5 + 20 * a**2 - 10 * a, 12.0)
    assert found["loss"] == pytest.approx(12.0, rel=0.02)


@pytest.mark.parametrize(("reference", "alpha"), [(0.5, 0.0), (1.0, 0.0), (1e9, LARGEST)])
def test_a_reference_out_of_reach_gives_an_end(reference, alpha):
    """An image that is as hard as unseen ones needs no step; no model leaves the line's end."""
    assert line_search(lambda a: 1 + a, reference)["alpha"] == alpha


def test_between():
    start, end = {"a": np.zeros(3, np.float32)}, {"a": np.full(3, 4.0, np.float32)}
    for alpha in (0.0, 0.25, 1.0, 2.0):
        np.testing.assert_array_equal(between(start, end, alpha)["a"], np.full(3, 4 * alpha, np.float32))
