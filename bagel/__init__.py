"""BAGEL: the model and its reference sampler. Readable alone; knows nothing of compression."""
