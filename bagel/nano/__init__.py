"""BAGEL-nano: a small world of coloured shapes, and the training of a small BAGEL on it.

Nothing else in `bagel` imports this package: it is a recipe for a checkpoint, not a part of the model.
"""
