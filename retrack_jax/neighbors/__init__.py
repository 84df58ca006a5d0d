"""Nearest training images: exact or by ScaNN, and the cache of the results."""

from retrack_jax.neighbors.search import nearest

__all__ = ["nearest"]
