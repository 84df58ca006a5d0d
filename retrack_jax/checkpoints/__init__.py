"""Checkpoints: diffusers' layout in and out, and this project's own runs."""
