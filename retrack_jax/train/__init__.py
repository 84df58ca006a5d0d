"""Training: state, optimizer, one pmapped step, one loop, and the checkpoints that it keeps."""
