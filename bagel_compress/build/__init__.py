"""From a recipe to an artifact: plan, compress, resume, what other loaders read."""
