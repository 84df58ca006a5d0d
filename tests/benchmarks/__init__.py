"""Benchmarks against PyTorch: `make bench`, or `python -m tests.benchmarks`. They need torch and diffusers, as the parity tests do."""
