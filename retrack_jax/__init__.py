"""ReTrack in JAX: remove training images from a diffusion model by redirecting its denoising trajectory.

Nothing heavy is imported here, so `import retrack_jax` and `--help` stay quick. The doors are
`retrack_jax.main` (command line), `retrack_jax.api` (Python) and `retrack_jax.checkpoints` (diffusers models in and out).
"""

__version__ = "0.1.0"
