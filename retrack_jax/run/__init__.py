"""A command's runs: train or load, sample, evaluate, report."""
