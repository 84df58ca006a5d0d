"""Blocks: their size by the pixels of an image, and that each number is scored once and in its place."""

import numpy as np
import pytest

from retrack_jax.checks import UserError
from retrack_jax.metrics.blocks import images_per_call, in_blocks


@pytest.mark.parametrize(("side", "images"), [(8, 256), (32, 256), (64, 64), (256, 4), (512, 1), (1024, 1)])
def test_a_call_has_no_more_pixels_than_256_images_of_32_x_32_and_no_more_images(side, images):
    assert images_per_call((side, side, 3)) == images


@pytest.mark.parametrize(
    ("total", "size", "shapes"),
    [(40, 4, [(4, 4)] * 3), (10, 4, [(4, 3)]), (9, 2, [(4, 2)] * 2), (3, 8, [(4, 1)]), (1, 1, [(4, 1)])],
)
def test_blocks_are_equal_and_cover_every_number_in_its_place(total, size, shapes):
    """Over the four devices of the tests; scores may be arrays."""
    seen = []

    def score(numbers):
        seen.append(numbers.shape)
        return np.stack([numbers, 2 * numbers], axis=-1)

    expected = np.arange(total)[:, None] * [1, 2]
    np.testing.assert_array_equal(in_blocks(score, total, (8, 8, 1), size), expected)
    assert seen == shapes


def test_a_name_shows_progress_in_images(capsys):
    in_blocks(lambda numbers: numbers, 9, (8, 8, 1), 2, "forget_loss")
    assert capsys.readouterr().err.startswith("forget_loss: 9/9 (100%), ")
    in_blocks(lambda numbers: numbers, 9, (8, 8, 1), 2)
    assert not capsys.readouterr().err


def test_by_default_the_images_decide_and_no_block_is_empty():
    seen = []
    in_blocks(lambda numbers: seen.append(numbers.shape) or numbers, 22, (256, 256, 3))
    assert seen == [(4, 3), (4, 3)]
    with pytest.raises(UserError, match="batch_size is 0"):
        in_blocks(lambda numbers: numbers, 6, (8, 8, 1), 0)
