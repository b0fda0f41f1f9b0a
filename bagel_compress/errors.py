"""One class per kind of user error.

All derive from BagelCompressError, which derives from BagelError of the model package `bagel` (raised, for example, on
an impossible image size), so `except BagelError` catches the errors of both packages.

A message is one sentence that says what was wrong, what was found, what was expected and what to do. The command line
prints it on stderr and exits with the exit code of the class.
"""

from bagel.errors import BagelError


class BagelCompressError(BagelError):
    """Base of everything a user can cause. Exit code 2: wrong usage or input."""

    exit_code = 2


class CheckpointError(BagelCompressError):
    """A checkpoint is incomplete, malformed, or not a BAGEL checkpoint."""


class RecipeError(BagelCompressError):
    """A recipe has an unknown key, codec or value."""


class TargetError(BagelCompressError):
    """A target or case file has an unknown key or an impossible value."""


class PlanError(BagelCompressError):
    """Recipe and checkpoint do not fit together: unmatched tensor, unused rule, codec that cannot be applied."""


class CodecError(BagelCompressError):
    """A tensor's values cannot be encoded, or stored parts cannot be decoded. Names the tensor."""


class CalibrationError(BagelCompressError):
    """A calibration set does not fit the checkpoint, or its second moments cannot be used for rounding."""


class ArtifactError(BagelCompressError):
    """An artifact folder is incomplete, inconsistent, or belongs to another plan."""


class TraceError(BagelCompressError):
    """A trace is truncated, comes from another checkpoint, or lacks something that is needed."""


class ExportError(BagelCompressError):
    """A block, codec or precision cannot be exported to this runtime."""


class HubError(BagelCompressError):
    """The Hub cannot be reached, refuses, or has no such repository, revision or file."""


class InputError(BagelCompressError):
    """A picture or another input of a request cannot be read."""


class BenchmarkError(BagelCompressError):
    """A benchmark's files or settings, or the answers of its judge, are invalid."""


class PublishError(BagelCompressError):
    """A release cannot be uploaded to this repository: it has another build, or the user may not write to it."""


class MissingExtraError(BagelCompressError):
    """An optional package is not installed; the message names the extra to install."""


class FinetuneError(BagelCompressError):
    """A fine-tuning run cannot start, go on or be trusted: its config, its data, or a loss that is no number."""


class GateError(BagelCompressError):
    """A check did not pass: verification, parity or budget. Exit code 1."""

    exit_code = 1
