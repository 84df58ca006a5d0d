"""One data set, one denoiser, one codec and one conditioning, composed."""
