"""Flax Linen networks, named and wired as in diffusers."""
