"""BAGEL: the model and its reference sampler. Readable alone; knows nothing of compression."""

IDENTITY = "the model package of bagel-compress"  # tells it from another project's package of the same name
