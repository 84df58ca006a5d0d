"""What exists for the speed of the CPU backend alone."""
