"""The diffusion process: schedules and the conversions between x_0, x_t, eps and score."""
