"""Checkpoints: diffusers' layout in and out, and this project's own runs."""

from retrack_jax.checkpoints.diffusers_export import export_diffusers
from retrack_jax.checkpoints.diffusers_import import import_diffusers, read_schedule_config

__all__ = ["export_diffusers", "import_diffusers", "read_schedule_config"]
