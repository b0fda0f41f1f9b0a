"""Training a model further: data, the loop, adapters over compressed bases, several GPUs, repair of a build."""
