"""What a user of the model can get wrong. One sentence: what, found, expected, what to do."""


class BagelError(Exception):
    """A model folder, an input or a sampler setting that cannot work."""

    exit_code = 2


class Cancelled(Exception):  # noqa: N818 - nothing went wrong
    """A listener ended a run because somebody asked it to; not a fault."""
