"""Metrics as pure functions of samples, features or a noise predictor."""
