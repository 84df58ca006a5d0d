"""The Python door: arrays in, parameters out, the caller's parameters untouched, mistakes named."""

import jax
import numpy as np
import pytest

from retrack_jax.api import unlearn
from retrack_jax.checkpoints.run_store import tree_digest
from tests import toys

SMALL = dict(num_steps=3, batch_size=8, num_neighbors=4, learning_rate=1e-3)


def go(rng, **options):
    return unlearn(
        toys.ToyNet().apply, toys.params(), toys.schedule(), toys.images(20), toys.images(2, 1), rng=rng, **{**SMALL, **options}
    )


def test_unlearn_returns_other_parameters_and_repeats_itself(rng):
    params = toys.params()
    before = tree_digest(params)
    first = unlearn(toys.ToyNet().apply, params, toys.schedule(), toys.images(20), toys.images(2, 1), rng=rng, **SMALL)
    assert tree_digest(params) == before
    assert toys.relative(first, params) > 1e-4
    assert tree_digest(go(rng)) == tree_digest(first)
    assert tree_digest(go(jax.random.key(1))) != tree_digest(first)


def test_pixels_and_floats_are_the_same_images(rng):
    floats = [images.astype(np.float32) / np.float32(127.5) - np.float32(1) for images in (toys.images(20), toys.images(2, 1))]
    ours = unlearn(toys.ToyNet().apply, toys.params(), toys.schedule(), *floats, rng=rng, **SMALL)
    assert toys.relative(ours, go(rng)) < 1e-6


@pytest.mark.parametrize(
    "options, words",
    [
        ({"method": "retrak"}, "did you mean 'retrack'"),
        ({"method": "retrain"}, "random weights"),
        ({"learning_rte": 1.0}, "did you mean 'learning_rate'"),
        ({"siss_scale": 1.0}, "does not read the option 'siss_scale'"),
        ({"num_neighbors": 21}, "k is 21"),
        ({"batch_size": 6}, "does not divide evenly over 4 devices"),
    ],
)
def test_mistakes_are_value_errors_that_name_them(options, words, rng):
    with pytest.raises(ValueError, match=words):
        go(rng, **options)
