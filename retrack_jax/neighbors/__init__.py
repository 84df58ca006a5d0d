"""Nearest remaining images of each forgotten image."""
