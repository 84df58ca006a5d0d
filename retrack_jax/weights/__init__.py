"""Files of weights, read without running anything they hold, and PyTorch's names."""
