"""One class per kind of user error.

All derive from BagelCompressError. It derives from the model's own BagelError (an impossible image size, say), so
`except BagelError` catches what either raises.

Each is raised with one sentence that says what was wrong, what was found, what was expected and what to do.
The command line turns them into that sentence on stderr and the exit code of the class; nothing else catches them.
"""

from bagel.errors import BagelError


class BagelCompressError(BagelError):
    """Base of everything a user can cause. Exit code 2: wrong usage or input."""

    exit_code = 2


class CheckpointError(BagelCompressError):
    """A checkpoint folder or file is missing something, malformed, or not what its name says."""


class RecipeError(BagelCompressError):
    """A recipe has an unknown key, codec or value."""


class TargetError(BagelCompressError):
    """A target or case file has an unknown key or an impossible value."""


class PlanError(BagelCompressError):
    """Recipe and checkpoint do not fit together: an unmatched tensor, an idle rule, a codec that cannot."""


class CodecError(BagelCompressError):
    """A tensor's values cannot be coded, or stored parts cannot be decoded. Names the tensor."""


class CalibrationError(BagelCompressError):
    """A calibration set does not fit the checkpoint, or what it gives cannot steer a rounding."""


class ArtifactError(BagelCompressError):
    """An artifact folder is incomplete, inconsistent, or belongs to another plan."""


class TraceError(BagelCompressError):
    """A trace is truncated, comes from another checkpoint, or does not hold what is asked of it."""


class ExportError(BagelCompressError):
    """A block, codec or precision cannot be exported to this runtime."""


class HubError(BagelCompressError):
    """The Hub cannot be reached, refuses, or has no such repository, revision or file."""


class InputError(BagelCompressError):
    """A picture or another input of a request cannot be read."""


class BenchmarkError(BagelCompressError):
    """A benchmark's files, its settings or the answers of its judge are not what they should be."""


class PublishError(BagelCompressError):
    """A release cannot go into this repository: another build is there, or the user may not write to it."""


class MissingExtraError(BagelCompressError):
    """An optional package is not installed; the message names the extra to install."""


class FinetuneError(BagelCompressError):
    """A fine-tuning run cannot start, go on or be trusted: its config, its data, or a loss that is no number."""


class GateError(BagelCompressError):
    """A gate did not pass: verification, parity or budget. Exit code 1."""

    exit_code = 1
