"""bagel-compress: compress, validate and publish BAGEL checkpoints."""
