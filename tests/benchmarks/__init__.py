"""Benchmarks against PyTorch: `make bench`, or `python -m tests.benchmarks`. They need torch and diffusers, as parity does."""
