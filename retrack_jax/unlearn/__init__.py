"""Losses, gradient combinations and the table of unlearning methods."""
