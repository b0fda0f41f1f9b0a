"""Compiled inner loops of the encoders. They release the GIL, work in place on numpy arrays and hold no state."""
