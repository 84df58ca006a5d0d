"""Typed, self-checking options, and the rules for those a config leaves open."""
