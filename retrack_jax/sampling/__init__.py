"""Samplers: one loop, one step rule a file."""
