"""Errors of the model package. A message is one sentence: what is wrong, what was found and expected, what to do."""


class BagelError(Exception):
    """A model folder, an input or a sampler setting that cannot work."""

    exit_code = 2


class Cancelled(Exception):  # noqa: N818 - nothing went wrong
    """Raised by a listener to end a run on request; not a fault."""


def shown(value: object) -> str:
    """The repr of a value for an error message, shortened if it is longer than 80 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # integers of 5,000 digits; lists in lists in lists
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
