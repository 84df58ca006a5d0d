"""Attention in float32 on a CPU.

    (1)  o = (w v) / sum_m w,  w = exp(l - max_m l),  l = q k^T / sqrt(D),  for each head of width D

This is softmax(l) v with the division after the product. XLA on CPU fuses all of it, where it writes the matrix of queries and
keys twice for the softmax; with the gradient it writes it twice in place of five times. docs/measurements/speed.md has the times.
"""

import jax
import jax.numpy as jnp

from retrack_jax.notation import Array


def attend(query: Array, key: Array, value: Array) -> Array:
    """Returns equation (1) for `query` `[B, N, heads, D]`, `key` and `value` `[B, M, heads, D]`, all float32."""
    query, key, value = (jnp.swapaxes(array, 1, 2) for array in (query, key, value))
    logits = jnp.einsum("bhnd,bhmd->bhnm", query * query.shape[-1] ** -0.5, key)
    # The result does not depend on what is subtracted, so it has no gradient.
    weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    sums = jnp.einsum("bhnm,bhmd->bhnd", weights, value)
    return jnp.swapaxes(sums / jnp.sum(weights, axis=-1, keepdims=True), 1, 2)
