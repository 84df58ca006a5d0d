"""Training: state, optimizer, one pmapped step, one loop."""
