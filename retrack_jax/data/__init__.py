"""Sources of uint8 images, targets to forget, and seeded batches."""
