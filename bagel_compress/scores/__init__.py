"""Benchmarks that are drawn and judged."""
