"""Measures how far a compressed model is from its reference, against a recorded trace of the reference.

Reading order: trace (what is recorded), record and replay (running the sampler), metrics and distances (comparing two
runs), linear_probes (comparing module by module), diagnose, attribution, verdict (limits), compare (all of it).
"""
