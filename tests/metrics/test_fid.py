"""Moments and the Fréchet distance: merges, closed forms, SciPy's square root, and fewer images than dimensions."""

import warnings

import numpy as np
import pytest

from retrack_jax.checks import UserError
from retrack_jax.metrics.fid import fid, trace_sqrt_product, unstable_reason
from retrack_jax.metrics.moments import moments_of


def _features(count, dim, seed=0, scale=1.0, shift=0.0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, dim)) @ rng.normal(size=(dim, dim)) * scale + shift).astype(np.float32)


def test_moments_are_numpys_mean_and_covariance():
    features = _features(50, 4, shift=1000.0)  # far from 0, where unshifted sums of squares cancel
    mean, cov = moments_of(features, block=7).compute()
    np.testing.assert_allclose(mean, features.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-9)


@pytest.mark.parametrize("block", [1, 17, 49])
def test_blocks_are_the_whole(block):
    features = _features(50, 4)
    whole, blocks = moments_of(features), moments_of(features, block)
    assert blocks.count == whole.count == 50
    np.testing.assert_allclose(blocks.mean, whole.mean, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(blocks.scatter, whole.scatter, rtol=1e-11, atol=1e-12)


def test_diagonal_gaussians_have_a_closed_form():
    one, two = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 1.0])
    assert trace_sqrt_product(np.diag(one), np.diag(two)) == pytest.approx(np.sqrt(one * two).sum(), rel=1e-12)


def test_agrees_with_scipys_square_root_at_full_rank():
    from scipy.linalg import sqrtm

    a, b = moments_of(_features(200, 8)), moments_of(_features(150, 8, seed=1, scale=1.3, shift=0.2))
    (mean_1, cov_1), (mean_2, cov_2) = a.compute(), b.compute()
    expected = ((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1 + cov_2 - 2 * sqrtm(cov_1 @ cov_2).real)
    assert fid(a, b) == pytest.approx(expected, rel=1e-9)
    assert fid(a, b) == pytest.approx(fid(b, a), rel=1e-9)


def test_equal_sets_are_at_distance_zero():
    moments = moments_of(_features(200, 8))
    assert 0.0 <= fid(moments, moments) < 1e-8 * np.trace(moments.compute()[1])


def test_is_exact_with_fewer_images_than_dimensions_and_says_so():
    a, b = _features(6, 16), _features(9, 16, seed=1)
    # Independent: tr sqrt(S1 S2) is the nuclear norm of the centered features' cross product.
    centered = [(x.astype(np.float64) - x.astype(np.float64).mean(0)) / np.sqrt(len(x) - 1) for x in (a, b)]
    nuclear = np.linalg.svd(centered[0] @ centered[1].T, compute_uv=False).sum()
    shift = a.astype(np.float64).mean(0) - b.astype(np.float64).mean(0)
    expected = shift @ shift + (centered[0] ** 2).sum() + (centered[1] ** 2).sum() - 2 * nuclear
    assert fid(moments_of(a), moments_of(b)) == pytest.approx(expected, rel=1e-9)
    assert "FID from 6 images has a singular 16-dimensional covariance" in unstable_reason(6, 9, 16)
    assert unstable_reason(16, 100, 16) and unstable_reason(100, 16, 16) and unstable_reason(17, 17, 16) is None


def test_constant_features_are_no_trouble():
    flat = moments_of(np.ones((20, 4), np.float32))
    other = moments_of(_features(20, 4))
    mean, cov = other.compute()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fid(flat, other) == pytest.approx(((mean - 1) ** 2).sum() + np.trace(cov))


def test_refuses_nan_other_networks_and_a_single_image():
    bad = _features(5, 4)
    bad[3, 1] = np.nan
    with pytest.raises(UserError, match="1 of 5 rows hold NaN or infinity, the first is row 3"):
        moments_of(bad)
    with pytest.raises(UserError, match="use one feature network"):
        fid(moments_of(_features(5, 4)), moments_of(_features(5, 5)))
    with pytest.raises(UserError, match="at least 2 images, found 1"):
        moments_of(_features(1, 4)).compute()
