"""Copies of the forgotten images among the remaining ones, against a comparison of every pair."""

import numpy as np
import pytest

from retrack_jax.data import distinct
from retrack_jax.data.dataset import RowView
from retrack_jax.data.distinct import copies_of


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_copies_are_those_of_every_pair(kind, monkeypatch):
    """Few values, so that many images share a line with a forgotten one and are no copies; several blocks."""
    monkeypatch.setattr(distinct, "_BLOCK", 64)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 2, (300, 3, 2, 1)).astype(kind)
    forget, rows = rng.integers(0, 2, (40, 3, 2, 1)).astype(kind), rng.permutation(300)[:150]
    equal = (forget[:, None] == images[rows][None]).all(axis=(2, 3, 4))
    expected = {row: int(np.argmax(equal[row])) for row in range(40) if equal[row].any()}
    assert 0 < len(expected) < 40 and copies_of(forget, images[rows]) == copies_of(forget, RowView(images, rows)) == expected


def test_a_line_in_common_is_no_copy():
    images = np.zeros((4, 4, 4, 1), np.uint8)
    images[:, 0] = np.arange(4)[:, None, None]
    assert copies_of(images[:1], images[1:]) == {}
    assert copies_of(images[2:3], images) == {0: 2}


def test_vectors_have_copies_too():
    vectors = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    assert copies_of(vectors[[4, 4, 0]], vectors[1:]) == {0: 3, 1: 3}
