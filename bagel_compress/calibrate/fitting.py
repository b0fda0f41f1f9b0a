"""Whether a calibration set fits a checkpoint: sizes, tokenizer, and enough rows for every weight. Headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from bagel.layout import official_role
from bagel_compress.calibrate.calibration_set import CalibrationSet, Inputs, tokenizer_fingerprint
from bagel_compress.calibrate.moments import block_width, least_rows
from bagel_compress.errors import CalibrationError
from bagel_compress.io.packaged import resource
from bagel_compress.io.tensor_spec import TensorSpec

READ_IN_LAST = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # k and v of the last layer serve all rows


def packaged_set(shapes: Mapping[str, tuple[int, ...]], files: Mapping[str, Path]) -> CalibrationSet | None:
    """The set that comes with the package for models of these shapes and this tokenizer, or None."""
    sizes = Inputs.of(shapes)
    for calibration in _packaged():
        if calibration.header.inputs == sizes and calibration.header.tokenizer == tokenizer_fingerprint(files):
            return calibration
    return None


@cache
def _packaged() -> tuple[CalibrationSet, ...]:
    return tuple(CalibrationSet.open(path) for path in sorted(resource("calibration").glob("*.safetensors")))


def expect_fit(
    calibration: CalibrationSet,
    specs: Sequence[TensorSpec],
    files: Mapping[str, Path] | None,
    weights: Sequence[TensorSpec],
) -> None:
    """Raises CalibrationError unless the set is for this model and has rows enough for each of `weights`.

    `specs`: of all tensors; `files`: of the checkpoint by name, None where only a header is at hand.
    """
    sizes = Inputs.of({spec.name: spec.shape for spec in specs})
    fingerprint = calibration.header.tokenizer if files is None else tokenizer_fingerprint(files)
    calibration.expect_model(sizes, fingerprint, "this checkpoint")
    last = max(role.layer or 0 for s in specs if (role := official_role(s.name)).component == "llm")
    for spec in weights:
        width = block_width(spec.shape[1])
        found, least = _rows(calibration, spec, last), least_rows(width)
        if found < least:
            raise CalibrationError(
                f"calibration set {calibration.path} gives {spec.name} {found} rows of inputs, {least - found} fewer"
                f" than the {least} that moments of a width of {width} need; make one of more prompts or times."
            )


def _rows(calibration: CalibrationSet, spec: TensorSpec, last: int) -> int:
    """Rows that reach a weight: of its expert; in the last layer mostly those whose result is read."""
    role, rows = official_role(spec.name), calibration.rows
    read = role.layer == last and any(name in spec.name for name in READ_IN_LAST)
    if role.expert == "gen":
        return rows.read_gen if read else rows.gen
    return rows.read_und if read else rows.und
