"""Runs benchmarks: prompts are answered by a model, and a scorer rates the answers."""
