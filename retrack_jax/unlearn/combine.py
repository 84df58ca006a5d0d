"""How a main and a correction gradient become one.

Both gradients are already accumulated over microbatches and averaged over devices: a norm and an inner product do not commute
with an average, so combining any earlier gives another answer. Trees go in, one tree comes out.

  (1) erasediff   g = g_R + max(eta - <g_R, g_c>/||g_c||^2, 0) g_c
  (2) siss        g = g_main - (s/||g_corr||) g_corr
"""

import jax.numpy as jnp
import optax

from retrack_jax.notation import Array, PyTree

# A gradient of zero has no direction. Its norm is held above this, far below any gradient's, so that the quotients stay finite.
_TINY = 1e-20


def erasediff(main: PyTree, correction: PyTree, eta: float | Array) -> PyTree:
    """Returns EraseDiff's gradient (1): the retain gradient, pushed until it also descends the correction at rate `eta`."""
    inner = optax.tree.vdot(main, correction)
    squared_norm = jnp.maximum(jnp.square(optax.tree.norm(correction)), _TINY)
    return optax.tree.add_scale(main, jnp.maximum(eta - inner / squared_norm, 0.0), correction)


def siss(main: PyTree, correction: PyTree, scale: float | Array) -> PyTree:
    """Returns SISS's gradient (2): ascent on the correction with its norm rescaled to `scale` (s)."""
    return optax.tree.add_scale(main, -scale / jnp.maximum(optax.tree.norm(correction), _TINY), correction)
