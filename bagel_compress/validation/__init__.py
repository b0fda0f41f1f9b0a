"""Validation: parity against a trace, memory and latency against a target, and the gate over both."""
