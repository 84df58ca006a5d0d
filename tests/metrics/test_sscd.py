"""SSCD's cosine, the normalized perturbation, and that SSCDnorm does not reward a ruined image."""

import numpy as np
import pytest

from retrack_jax.checks import UserError
from retrack_jax.metrics.sscd import RADIUS, cosine_similarity, normalized_perturbation, sscd, sscd_norm, sscd_of_nearest


def _embed(images):
    """A stand-in embedding with known answers: pixels about their mean."""
    flat = images.reshape(len(images), -1).astype(np.float64)
    return {"features": flat - flat.mean(axis=1, keepdims=True)}


def _images(count, seed=0, low=0.3, high=0.7):
    return np.random.default_rng(seed).uniform(low, high, (count, 8, 8, 3)).astype(np.float32)


def test_cosine_by_hand():
    np.testing.assert_allclose(cosine_similarity([[1.0, 0.0], [3.0, 4.0], [-2.0, 0.0]], [[1.0, 0.0]]), [1.0, 0.6, -1.0])
    np.testing.assert_allclose(cosine_similarity([[1.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [1.0, 0.0]]), [1.0, 0.0])


def test_a_copy_scores_one_and_another_image_does_not():
    target = _images(1)
    images = np.concatenate([target, _images(1, seed=1)])
    copy, other = sscd(_embed, images, target)
    assert copy == pytest.approx(1.0) and abs(other) < 0.5


def test_the_perturbation_has_one_size_and_keeps_its_direction():
    target, images = _images(1), _images(3, seed=1)
    images[1] = target[0] + 0.001 * (images[1] - target[0])
    moved = normalized_perturbation(images, target)
    difference = (moved - target).reshape(3, -1)
    np.testing.assert_allclose(np.sqrt((difference**2).mean(axis=1)), RADIUS, rtol=1e-3)
    np.testing.assert_allclose(cosine_similarity(difference, (images - target).reshape(3, -1)), 1.0, atol=1e-3)
    np.testing.assert_array_equal(normalized_perturbation(target, target), target)


def test_size_alone_changes_sscd_but_not_sscd_norm():
    target = _images(1)
    direction = np.random.default_rng(3).normal(size=target.shape).astype(np.float32)
    near, far = (np.clip(target + size * direction, 0, 1) for size in (0.05, 0.1))
    plain = [sscd(_embed, image, target)[0] for image in (near, far)]
    normed = [sscd_norm(_embed, image, target)[0] for image in (near, far)]
    assert plain[0] - plain[1] > 0.1
    assert abs(normed[0] - normed[1]) < 0.02


def test_refuses():
    target = _images(1)
    with pytest.raises(UserError, match="do not pair"):
        cosine_similarity(np.ones((3, 2)), np.ones((2, 2)))
    with pytest.raises(UserError, match="do not pair"):
        sscd_norm(_embed, _images(2)[:, :4], target)
    with pytest.raises(UserError, match="NaN"):
        sscd(_embed, target * np.nan, target)


def test_the_nearest_of_several_pictures_counts():
    targets = _images(2)
    images = np.concatenate([targets[1:], _images(1, seed=1)])
    copy, other = sscd_of_nearest(_embed, images, targets)
    assert copy == pytest.approx(1.0)
    assert other == pytest.approx(max(sscd(_embed, images[1:], one[None])[0] for one in targets))
