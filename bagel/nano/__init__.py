"""The small world of BAGEL-nano: coloured shapes, what is said about them, and a detector that reads pictures back.

Nothing else in `bagel` imports this package, and it needs no torch. The training is `bagel_compress.nano_training`.
"""
