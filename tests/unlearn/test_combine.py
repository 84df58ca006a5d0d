"""Combined gradients against the float64 oracle."""

import jax.numpy as jnp
import numpy as np
import pytest

from retrack_jax.unlearn import combine
from retrack_jax.unlearn.methods import METHODS
from retrack_jax.unlearn.options import SissOptions
from tests.oracles import losses as oracle
from tests.oracles import record

CASES = record.load()


def split(vector):
    """A flat vector as a tree of two leaves."""
    vector = jnp.asarray(vector, jnp.float32)
    return {"a": vector[:20].reshape(4, 5), "b": vector[20:]}


def joined(tree):
    return np.concatenate([np.ravel(tree["a"]), np.ravel(tree["b"])])


@pytest.mark.parametrize("case", ["combine_erasediff_active", "combine_erasediff_idle"])
def test_erasediff(case):
    given, expected = CASES[case]["in"], CASES[case]["out"]["combined"]
    ours = combine.erasediff(split(given["g_remain"]), split(given["g_correction"]), float(given["eta"]))
    np.testing.assert_allclose(joined(ours), expected, rtol=1e-5, atol=1e-6)


def test_siss():
    given, expected = CASES["combine_siss"]["in"], CASES["combine_siss"]["out"]["combined"]
    main, correction = split(given["g_main"]), split(given["g_correction"])
    np.testing.assert_allclose(joined(combine.siss(main, correction, float(given["scale"]))), expected, rtol=1e-5, atol=1e-6)
    scale = 0.1 * oracle.global_norm(np.asarray(given["g_main"]))
    automatic = oracle.combine_siss(np.asarray(given["g_main"]), np.asarray(given["g_correction"]), scale)
    ours = METHODS["siss"].combine(main, correction, SissOptions(share=0.1))
    np.testing.assert_allclose(joined(ours), automatic, rtol=1e-5, atol=1e-6)


def test_a_zero_correction_changes_nothing():
    main = split(np.arange(50.0))
    zero = split(np.zeros(50))
    for combined in (combine.siss(main, zero, 5.0), combine.erasediff(main, zero, 1e-3)):
        np.testing.assert_array_equal(joined(combined), joined(main))
