"""Calibration: what the inputs of each linear layer look like, and codes chosen for them."""
