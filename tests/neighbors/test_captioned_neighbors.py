"""Neighbors by image and caption together, against every pair in float64."""

import numpy as np
import pytest

from retrack_jax.neighbors.captions import captioned_nearest, similarities
from retrack_jax.neighbors.search import nearest

RNG = np.random.default_rng(0)
FORGET, REMAIN = (RNG.standard_normal((count, 3, 3, 2)).astype(np.float32) for count in (3, 30))
TEXT = RNG.standard_normal((6, 4)).astype(np.float32)
TEXT /= np.linalg.norm(TEXT, axis=1, keepdims=True)
FORGET_CAPTION, REMAIN_CAPTION = np.array([0, 1, 5]), np.arange(30) % 5
HOW = {"text": TEXT, "forget_caption": FORGET_CAPTION, "remain_caption": REMAIN_CAPTION}


def every_pair():
    distances = np.linalg.norm((FORGET[:, None] - REMAIN[None]).reshape(3, 30, -1).astype(np.float64), axis=2)
    return distances, TEXT[FORGET_CAPTION].astype(np.float64) @ TEXT[REMAIN_CAPTION].T


def test_without_weight_they_are_the_nearest_images_to_the_bit():
    found = captioned_nearest(FORGET, REMAIN, 4, "exact", **HOW)
    rows, distances = nearest(FORGET, REMAIN, 4, "exact")
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_array_equal(found.distances, distances)
    assert found.bias is None
    np.testing.assert_allclose(found.similarity, np.take_along_axis(every_pair()[1], rows, 1), atol=1e-6)


@pytest.mark.parametrize("beta", [0.5, 20.0, 1e4])
def test_with_weight_they_maximize_the_kernel_where_signal_and_noise_are_equal(beta):
    found = captioned_nearest(FORGET, REMAIN, 4, "exact", **HOW, beta=beta)
    distances, similarity = every_pair()
    expected = np.argsort(distances**2 / 2 - beta * similarity, axis=1)[:, :4]
    if beta < 1e4:  # beyond, equal captions tie but for rounding
        np.testing.assert_array_equal(found.rows, expected)
    else:
        best = np.take_along_axis(similarity, found.rows, 1)
        np.testing.assert_allclose(best, np.sort(similarity, axis=1)[:, ::-1][:, :4], atol=1e-5)
    np.testing.assert_allclose(found.distances, np.take_along_axis(distances, found.rows, 1), rtol=1e-6)
    np.testing.assert_allclose(found.bias, beta * np.take_along_axis(similarity, found.rows, 1), rtol=1e-5, atol=beta * 1e-6)


def test_equal_captions_alone():
    """Caption 0 has six images that remain, caption 5 none; of eight wanted, two only fill up."""
    found = captioned_nearest(FORGET[:1], REMAIN, 8, "exact", **{**HOW, "forget_caption": FORGET_CAPTION[:1]}, same_caption=True)
    equal = np.flatnonzero(REMAIN_CAPTION == 0)
    distances = every_pair()[0][0][equal]
    np.testing.assert_array_equal(found.rows[0, :6], equal[np.argsort(distances)])
    assert (found.rows[0, 6:] == found.rows[0, 0]).all()
    np.testing.assert_array_equal(found.bias[0], [0] * 6 + [-np.inf] * 2)
    few = captioned_nearest(FORGET, REMAIN, 4, "exact", **HOW, same_caption=True)
    assert few.bias is None and (few.similarity[:2] == 1).all()
    np.testing.assert_array_equal(few.rows[2], nearest(FORGET[2:], REMAIN, 4, "exact")[0][0])


@pytest.mark.parametrize("beta", [0.5, 20.0])
def test_a_caption_that_nothing_else_has_is_searched_as_without_same_caption(beta):
    """Caption 5 remains nowhere, and the others do: their neighbors count alike, whatever beta is."""
    found = captioned_nearest(FORGET, REMAIN, 4, "exact", **HOW, beta=beta, same_caption=True)
    alone = captioned_nearest(FORGET, REMAIN, 4, "exact", **HOW, same_caption=True)
    without = captioned_nearest(FORGET, REMAIN, 4, "exact", **HOW, beta=beta)
    for row, expected in ((0, alone), (1, alone), (2, without)):
        np.testing.assert_array_equal(found.rows[row], expected.rows[row])
        np.testing.assert_array_equal(found.distances[row], expected.distances[row])
    np.testing.assert_array_equal(found.bias[:2], 0)
    np.testing.assert_array_equal(found.bias[2], without.bias[2])


def test_only_equal_captions_have_a_similarity_of_one():
    text = np.stack([TEXT[0], TEXT[0] * np.float32(1 + 1e-7), TEXT[1]])
    np.testing.assert_array_equal(similarities(text, np.array([0]), np.array([0, 1, 2]))[0] == 1, [True, False, False])
