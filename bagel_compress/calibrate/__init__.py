"""What a model is shown before its weights are rounded: the calibration set, second moments, rounding."""
