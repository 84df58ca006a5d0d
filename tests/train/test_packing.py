"""A packed tree comes back as it was, and the optimizer that works on packed trees is plain optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from retrack_jax.train import packing
from retrack_jax.train.optimizer import make_optimizer
from retrack_jax.train.packing import pack

ADAMW = {"learning_rate": 1e-2, "b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.1}


def tree(seed: int) -> dict:
    """Leaves on both sides of the limit, an empty and a scalar one among them."""
    side = int(packing._SMALL**0.5) + 1
    shapes = {"kernel": (side, side), "other": (2, side * side), "limit": (packing._SMALL,)}
    shapes |= {"bias": (side,), "empty": (0, 3), "scale": ()}
    rng = np.random.default_rng(seed)
    return {name: {"value": jnp.asarray(rng.standard_normal(shape), jnp.float32)} for name, shape in shapes.items()}


def test_round_trip():
    before = tree(0)
    packed, unpack = pack(before)
    assert len(packed["large"]) == 2 and packed["small"].ndim == 1
    after = unpack(packed)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert old.dtype == new.dtype and old.shape == new.shape
        np.testing.assert_array_equal(old, new)


def test_only_small_or_only_large_leaves():
    for keep in (["bias"], ["kernel"], []):
        before = {name: tree(0)[name] for name in keep}
        packed, unpack = pack(before)
        jax.tree.map(np.testing.assert_array_equal, unpack(packed), before)


def test_leaves_of_two_dtypes_keep_theirs():
    before = {"a": jnp.arange(3, dtype=jnp.bfloat16), "b": jnp.arange(2, dtype=jnp.float32)}
    with jax.numpy_dtype_promotion("standard"):
        packed, unpack = pack(before)
    assert packed["small"].dtype == jnp.float32
    assert jax.tree.map(lambda leaf: leaf.dtype, unpack(packed)) == jax.tree.map(lambda leaf: leaf.dtype, before)


@jax.numpy_dtype_promotion("standard")  # optax raises a float to an int32 power
def test_optimizer_is_plain_optax():
    plain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(**ADAMW))
    ours = make_optimizer(clip_norm=1.0, **ADAMW)
    expected = actual = tree(0)
    plain_state, our_state = plain.init(expected), ours.init(actual)
    for step in range(3):
        grad = tree(step + 1)
        updates, plain_state = jax.jit(plain.update)(grad, plain_state, expected)
        expected = optax.apply_updates(expected, updates)
        updates, our_state = jax.jit(ours.update)(grad, our_state, actual)
        actual = optax.apply_updates(actual, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), actual, expected)
