"""Checkpoints of diffusers, in and out."""

from retrack_jax.checkpoints.diffusers_export import export_diffusers
from retrack_jax.checkpoints.diffusers_import import import_diffusers, read_schedule_config
from retrack_jax.checkpoints.pipeline_export import export_pipeline
from retrack_jax.checkpoints.single_file import export_single_file
from retrack_jax.checkpoints.stable_diffusion import load_pipeline, prompt_embeddings

__all__ = [
    "export_diffusers", "export_pipeline", "export_single_file", "import_diffusers", "load_pipeline", "prompt_embeddings",
    "read_schedule_config",
]  # fmt: skip
