"""The test suite of retrack_jax."""
