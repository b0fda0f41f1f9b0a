"""The reports of validation as frozen data, written to JSON and read back. No torch.

Reports lie in the artifact's folder, under reports/. They contain the digest of the artifact's manifest, so that a
report cannot be taken for one of another build.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PlainSerializer, ValidationError

from bagel.errors import shown
from bagel.json_file import small_bytes
from bagel_compress.build.limits import METRICS, unknown_metric
from bagel_compress.errors import ArtifactError, GateError
from bagel_compress.io.atomic import write_atomic
from bagel_compress.io.yaml_model import FrozenModel

PRESET = ", preset "  # in Row.case, between the name of the case and that of the preset it was drawn with
REPORTS = "reports"
PARITY = "parity.json"
NAME = r"^[\w.-]+$"  # pattern of names that become file names: none can lead out of its folder
STEP, IMAGE, FIRST_TOKEN, TOKEN = "denoising step", "image", "time to first token", "decoded token"  # Timing.what


def _to_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no infinity


def _from_json(value: Any) -> float:
    if not isinstance(value, (int, float, str)):
        raise ValueError(f"expected a number, found a {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError("the number is too large") from None


Number = Annotated[float, BeforeValidator(_from_json), PlainSerializer(_to_json, when_used="json")]


class StepDistance(FrozenModel):
    """Distance of one velocity from the reference's."""

    step: int
    t: float  # time of the step
    branch: str  # cond, text, image or guided
    rel_l2: Number
    cosine: Number


class StateDistance(FrozenModel):
    """Distance of the rows after a layer, or after a stage before the layers, from the reference's."""

    event: str  # a prefill of the contexts or a denoising step: "01_text", "step12"
    name: str  # "layer3", "vit_out"
    rel_l2: Number


class TextPair(FrozenModel):
    """The texts of the free runs. The first `prefix` of the reference's `length` token ids agree."""

    reference: str
    found: str
    exact: bool
    prefix: int
    length: int


class CaseParity(FrozenModel):
    """Everything that was measured for one case."""

    name: str = Field(pattern=NAME)
    kind: str
    prompt: str
    metrics: dict[str, Number]
    floor: dict[str, dict[str, Number]] = Field(
        default_factory=dict, description="metric -> what was changed in the reference -> its own distance"
    )
    steps: tuple[StepDistance, ...] = ()
    states: tuple[StateDistance, ...] = ()
    drift: str | None = None  # the state where the error begins (distances.first_drift)
    text: TextPair | None = None
    has_image: bool = False
    input_pictures: Annotated[int, Field(ge=0, le=64)] = 0  # how many the case shows the model, and its picture's file


def _known(metric: str) -> str:
    if metric not in METRICS:
        raise ValueError(unknown_metric(shown(metric)))
    return metric


class Row(FrozenModel):
    """One value with its noise floor and its limit."""

    case: str  # empty for a value over all cases
    metric: Annotated[str, AfterValidator(_known)]
    value: Number
    floor: Number | None
    limit: Number
    source: str  # where the limit comes from: its class, or the recipe
    ok: bool


class ComponentCost(FrozenModel):
    """Attribution: the error of the reference with one component taken from the artifact."""

    component: str
    velocity: Number | None  # error of the path (velocity.path), mean over cases
    logits: Number | None  # mean KL divergence of the logits


class ModuleDistance(FrozenModel):
    """Distance of a linear module's outputs for fixed inputs from the reference's."""

    module: str
    codec: str
    rel_l2: Number
    gain: Number


class LayerRounding(FrozenModel):
    """The effect of calibrated rounding on the matrices of one layer and expert.

    Errors are relative errors of the matrices' outputs for the calibration set's inputs, root mean squares over the
    matrices.
    """

    layer: int
    expert: str
    error: Number  # with calibrated rounding
    nearest: Number  # with each weight rounded to nearest
    predictor: Number  # the ratio error / nearest that the second moments of the inputs predict

    @property
    def ratio(self) -> float:
        """`error` / `nearest`; 1 if nothing was rounded."""
        return self.error / self.nearest if self.nearest else 1.0


class ParityReport(FrozenModel):
    """How far an artifact is from its reference. `faults` are diagnosed causes, `broken` the limits that are broken."""

    artifact: str  # sha256 of the artifact's manifest
    name: str
    level: str
    source: str
    source_digest: str
    environment: dict[str, str]
    rows: tuple[Row, ...]
    cases: tuple[CaseParity, ...]
    shares: tuple[ComponentCost, ...] = ()
    modules: tuple[ModuleDistance, ...] = ()
    rounding: tuple[LayerRounding, ...] = ()  # of the layers whose rounding was calibrated
    faults: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()  # one sentence per limit or task that was not measured
    pictures: dict[str, str] = Field(default_factory=dict)  # case -> BLAKE3 of its picture's file, reports/CASE.png
    notes: tuple[str, ...] = ()

    @property
    def broken(self) -> list[str]:
        """One sentence per broken limit, and per limit or task that was not measured."""
        return [*(sentence(row) for row in self.rows if not row.ok), *self.missing]

    @property
    def passed(self) -> bool:
        """Whether every limit was measured and holds, and no fault was found."""
        return not self.broken and not self.faults

    def require(self) -> None:
        """Raises GateError, a sentence per broken limit and per fault, unless the report passed."""
        if not self.passed:
            raise GateError(f"{self.name} did not pass parity: " + " ".join([*self.faults, *self.broken]))

    def save(self, folder: Path) -> Path:
        """Writes reports/parity.json under the artifact's folder."""
        return write_json(self, folder / REPORTS / PARITY)

    @classmethod
    def load(cls, folder: Path, digest: str | None = None) -> ParityReport:
        """Reads the report of an artifact's folder.

        Raises ArtifactError if there is none, or if the build it belongs to does not have this `digest`.
        """
        report = read_json(cls, folder / REPORTS / PARITY)
        if digest is not None and report.artifact != digest:
            raise ArtifactError(
                f"{folder / REPORTS / PARITY} belongs to another build ({report.artifact[:12]}, this one is"
                f" {digest[:12]}); validate the artifact again."
            )
        return report


class PhaseUse(FrozenModel):
    """Predicted peak device memory of one phase of a task in bytes, by use, and the measured peak."""

    name: str
    parts: dict[str, Number]
    measured: Number | None = None  # on the GPU `measured_on`; None if it was only predicted

    @property
    def total(self) -> float:
        return sum(self.parts.values())


class Timing(FrozenModel):
    """A measured time in seconds: median and 90 % quantile, and the median of the reference, measured alternately."""

    what: str
    median: Number
    p90: Number
    reference: Number | None = None

    @property
    def ratio(self) -> float | None:
        """The time as a multiple of the reference's; None without a reference."""
        return None if not self.reference else self.median / self.reference


class BudgetReport(FrozenModel):
    """Memory, disk space and times of an artifact on a target. Peaks are predicted unless `measured_on` names a GPU.

    `timed_on` names the device of the times; it need not be the target's.
    """

    artifact: str  # sha256 of the manifest, or the plan's digest where nothing was built yet
    name: str
    target: str = Field(pattern=NAME)
    device: str
    limit: Number | None  # usable device memory in bytes
    phases: tuple[PhaseUse, ...] = Field(min_length=1)
    disk: Number = 0.0
    disk_limit: Number | None = None
    timings: tuple[Timing, ...] = ()
    measured_on: str | None = None
    timed_on: str | None = None
    advice: tuple[str, ...] = ()
    overruns: tuple[str, ...] = ()  # one sentence per broken limit

    @property
    def peak(self) -> float:
        return max(p.total for p in self.phases)

    @property
    def broken(self) -> list[str]:
        return list(self.overruns)

    def save(self, folder: Path) -> Path:
        """Writes reports/budget-TARGET.json under the artifact's folder."""
        return write_json(self, folder / REPORTS / f"budget-{self.target}.json")


def load_budgets(folder: Path, digest: str | None = None) -> list[BudgetReport]:
    """The budget reports in an artifact's folder. Raises ArtifactError on one of another target or another `digest`."""
    paths = sorted((folder / REPORTS).glob("budget-*.json"))
    reports = [read_json(BudgetReport, path) for path in paths]
    for path, report in zip(paths, reports, strict=True):
        if path.name != f"budget-{report.target}.json":
            raise ArtifactError(f"{path} is about target {report.target}; run `bagel-compress budget` again.")
        if digest is not None and report.artifact != digest:
            raise ArtifactError(
                f"{folder / REPORTS}/budget-{report.target}.json belongs to another build ({report.artifact[:12]}, this"
                f" one is {digest[:12]}); run `bagel-compress budget` again."
            )
    return reports


def sentence(row: Row) -> str:
    """The sentence for a row with a broken limit."""
    where = f"case {row.case}: " if row.case else ""
    if math.isnan(row.value):
        return f"{where}{row.metric} is not a number, the limit is {number(row.limit)}."
    side = "above" if row.value > row.limit else "below"
    preset = row.case.partition(PRESET)[2]
    advice = (
        f" Take {preset} out of the recipe's `fast` and build again, or choose another by `speed`." if preset else ""
    )
    return f"{where}{row.metric} is {number(row.value)}, {side} the limit of {number(row.limit)}.{advice}"


def number(value: float) -> str:
    """A value as text with four significant digits; infinity, the PSNR of equal pictures, is called equal."""
    return "equal" if value == math.inf else f"{value:.4g}"


def write_json(model: BaseModel, path: Path) -> Path:
    """Writes a report, and creates its folder if it is missing. Returns the path."""
    write_atomic(path, model.model_dump_json(indent=1) + "\n")
    return path


def read_json(model: type[Any], path: Path) -> Any:
    """Reads a report of class `model`. Raises ArtifactError if the file is missing or of another version."""
    try:
        return model.model_validate_json(small_bytes(path))
    except OSError:
        raise ArtifactError(f"{path} does not exist; run `bagel-compress validate` first.") from None
    except (UnicodeDecodeError, ValidationError) as error:
        raise ArtifactError(
            f"{path} is no report of this version ({str(error).splitlines()[0]}); validate again."
        ) from None
