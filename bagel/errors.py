"""What a user of the model can get wrong. One sentence: what, found, expected, what to do."""


class BagelError(Exception):
    """A model folder, an input or a sampler setting that cannot work."""

    exit_code = 2


class Cancelled(Exception):  # noqa: N818 - nothing went wrong
    """A listener ended a run because somebody asked it to; not a fault."""


def shown(value: object) -> str:
    """A value from a file as a sentence shows it: its repr, of 80 characters at most."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # integers of 5,000 digits; lists in lists in lists
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
