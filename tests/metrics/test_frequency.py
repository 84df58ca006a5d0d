"""Frequency against hand-worked distances, and what it refuses."""

import numpy as np
import pytest

from retrack_jax.checks import UserError
from retrack_jax.metrics.frequency import frequency_upper_bound, target_distances


def test_distances_by_hand():
    target = np.zeros((2, 2, 1), np.float32)
    samples = np.stack([np.full((2, 2, 1), value, np.float32) for value in (0.0, 0.25, 0.5, 1.0)])
    np.testing.assert_allclose(target_distances(samples, target), [0.0, 0.5, 1.0, 2.0])  # sqrt(4 v^2) = 2 v


def test_a_group_counts_the_nearest_of_its_images_and_copies_change_nothing():
    rng = np.random.default_rng(0)
    samples, targets = rng.random((5, 3, 3, 2), np.float32), rng.random((3, 3, 3, 2), np.float32)
    expected = [min(np.sqrt(((s - t).astype(np.float64) ** 2).sum()) for t in targets) for s in samples]
    np.testing.assert_allclose(target_distances(samples, targets), expected, rtol=1e-6)
    np.testing.assert_array_equal(target_distances(samples, targets[[0, 1, 2, 2, 0]]), target_distances(samples, targets))


def test_uint8_and_floats_agree_up_to_rounding_of_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 2, 2, 1), dtype=np.uint8)
    np.testing.assert_allclose(
        target_distances(pixels, pixels[0]), target_distances(pixels / np.float32(255), pixels[0]), atol=1e-6
    )


def test_upper_bound_of_zero_hits_is_the_closed_form():
    assert frequency_upper_bound(0, 2000) == pytest.approx(1 - 0.05 ** (1 / 2000))
    assert frequency_upper_bound(0, 2000) < 0.0015
    assert frequency_upper_bound(3, 3) == 1.0
    assert frequency_upper_bound(10, 2000) > 10 / 2000


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.full((3, 2, 2, 1), np.nan, np.float32), "3 of 3 images hold NaN"),
        (np.full((3, 2, 2, 1), 2.0, np.float32), "expected uint8, or floats in"),
        (np.zeros((3, 4, 4, 1), np.float32), "same size and channels"),
        (np.zeros((3, 2, 2), np.float32), "shape"),
        (np.zeros((3, 2, 2, 1), np.int32), "int32"),
    ],
)
def test_refuses(samples, message):
    with pytest.raises(UserError, match=message):
        target_distances(samples, np.zeros((2, 2, 1), np.float32))
