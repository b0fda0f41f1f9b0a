"""Validation: an artifact or export against traces of its source and against targets; several recipes side by side."""
