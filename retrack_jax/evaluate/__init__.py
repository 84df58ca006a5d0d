"""Samples to metrics.json, runs to summary.json."""
