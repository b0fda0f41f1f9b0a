"""Ranks the packaged recipes, and finished builds, that fit a GPU, by the expected error of their weights.

For each candidate the peak memory is predicted as the command `budget` does, for the packaged targets that use the GPU
in different ways (everything on it, or parts in host memory); the first target that fits is chosen. No weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bagel_compress.budgets.fake_model import BuildOutline
from bagel_compress.budgets.known_builds import KnownBuild
from bagel_compress.budgets.machine import Machine
from bagel_compress.budgets.plan_devices import gpu_of, held_bytes, plan_map
from bagel_compress.budgets.predict import least_bytes, predict
from bagel_compress.budgets.recommend import Errors, expected_errors, packaged_recipes, target_variants
from bagel_compress.build.plan import make_plan
from bagel_compress.codecs.base import Codec
from bagel_compress.errors import ExportError, TargetError
from bagel_compress.run.target import GIB, Target
from bagel_compress.source.released_header import REPO, TrueHeader

SHOWN = 6  # rows of the table by default
SECONDS_PER_GB = 2.0  # to build 1e9 bytes of bf16 from disk: the slowest uncalibrated build in docs/benchmarks.md
CALIBRATION = "bagel.calibration.safetensors"
SAME_WITHIN = 0.01  # recipes whose errors and sizes differ by less than this share are shown in one row


@dataclass(frozen=True, slots=True)
class Choice:
    """A recipe or a finished build, with the packaged target (or the several GPUs) that it fits."""

    name: str  # of the recipe, or the folder or repository of the build
    summary: str
    target: str  # name of the target; of several, separated by spaces, if GPUs share the model
    placed: bool  # parts of the model wait in host memory, so --target must be given to use it
    errors: Errors
    peak: int  # predicted bytes on the fullest GPU
    limit: int  # usable bytes of that GPU
    weights: int  # bytes of the build
    download: int  # bytes
    disk: int  # bytes needed: download and build; 0 for a build in a local folder
    build_seconds: float | None  # 0: it is built; None: not known, it needs a calibration set
    calibrated: bool
    alike: tuple[str, ...] = ()  # recipes of the same size and error, for other loaders
    commands: tuple[str, ...] = ()  # to run, in order

    def to_json(self) -> dict[str, Any]:
        """Plain data for --json."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Candidate:
    name: str
    build: BuildOutline
    errors: Errors
    calibrated: bool
    known: KnownBuild | None = None  # None: a recipe, still to be built
    summary: str = ""
    codecs: frozenset[Codec] = field(default_factory=frozenset)


def advise(
    targets: Sequence[Target],
    *,
    source: str = REPO,
    builds: Sequence[KnownBuild] = (),
    count: int = SHOWN,
    on_candidate: Callable[[str], None] = lambda name: None,
) -> list[Choice]:
    """The recipes and builds that fit the target, or the GPUs of several targets together, by expected error.

    `source` is the checkpoint to build from (a Hub id, or a folder, which needs no download); `builds` are ranked
    beside the recipes; `count` is the number of choices. `on_candidate` is called with the name of each candidate
    before its peak is predicted, which takes seconds. Raises TargetError if nothing fits.
    """
    found: list[Choice] = []
    for candidate in sorted(_candidates(targets[0], builds), key=_rank):
        same = next((i for i, choice in enumerate(found) if _alike(choice, candidate)), None)
        if same is not None:
            found[same] = replace(found[same], alike=tuple(sorted((*found[same].alike, candidate.name))))
            continue
        if len(found) >= count:
            break
        on_candidate(candidate.name)
        choice = _on_several(candidate, targets) if len(targets) > 1 else _on_one(candidate, targets[0])
        if choice is not None:
            found.append(_with_costs(choice, candidate, source, targets))
    if not found:
        names = " ".join(target.name for target in targets)
        hint = (
            "give a target with more memory or with smaller `sizes`"
            if targets[0].export
            else f"`bagel-compress fit --target {targets[0].name}` looks for a rate that does, with fewer tasks"
            " (--tasks t2i) if need be"
        )
        raise TargetError(f"no packaged recipe and no given build fits {names}; {hint}.")
    return found


def _candidates(target: Target, builds: Sequence[KnownBuild]) -> Iterator[_Candidate]:
    for name, recipe in packaged_recipes().items():
        if (recipe.export is None) != (target.export is None):
            continue
        plan = make_plan(TrueHeader(), recipe)
        errors = expected_errors((p.codec, p.unit.specs) for p in plan.placements)
        codecs = frozenset(p.codec for p in plan.placements)
        if errors is not None and _runs(codecs, target):
            build = BuildOutline.of_plan(plan)
            yield _Candidate(name, build, errors, plan.calibrated, summary=recipe.summary, codecs=codecs)
    for known in builds if target.export is None else ():
        errors = expected_errors((stored.codec, stored.unit.specs) for stored in known.build.units)
        if errors is not None:
            where = f"{known.build.name}, " + ("to download" if known.download else "built already")
            yield _Candidate(known.name, known.build, errors, False, known, where)


def _rank(candidate: _Candidate) -> tuple[float, int, int]:
    """Sort key: least error first; of equal errors local builds, then builds to download, then the smaller recipe."""
    known = candidate.known
    effort = 2 if known is None else 1 if known.download else 0
    return candidate.errors.all, effort, candidate.build.disk


def _runs(codecs: frozenset[Codec], target: Target) -> bool:
    """Whether the target's runtime can run an export of these formats; True if the target is no export."""
    if target.export is None:
        return True
    least = max(codec.least_capability for codec in codecs)
    numbers = [int(name.removeprefix("sm")) for name in target.export.capabilities]
    if numbers and min(numbers) < least:
        return False
    try:
        for codec in codecs:
            codec.onnx_form("a weight", target.export.runtime, target.export.activations)
    except ExportError:
        return False
    return True


def _on_one(candidate: _Candidate, target: Target) -> Choice | None:
    """The candidate on the first variant of the target that it fits; None if there is none."""
    layers = candidate.build.config.llm.num_layers
    for variant in target_variants(target):
        if least_bytes(candidate.build.units, variant, layers) > variant.limit:
            continue
        report = predict(candidate.build, variant)
        if not report.broken:
            placed = variant.residency is not None or variant.vae_on_host
            return _choice(candidate, variant.name, placed, report.peak, variant.limit)
    return None


def _on_several(candidate: _Candidate, targets: Sequence[Target]) -> Choice | None:
    """The candidate divided over several GPUs, with only the embeddings in host memory; None if it does not fit."""
    gpus = [gpu_of(target, f"cuda:{index}") for index, target in enumerate(targets)]
    if sum(held_bytes(candidate.build).values()) > sum(gpu.room for gpu in gpus):
        return None
    try:
        plan = plan_map(candidate.build, gpus, targets[0].sizes)
    except TargetError:
        return None
    if plan.places.waiting - {"embed_tokens"}:
        return None
    fullest = max(plan.loads, key=lambda load: load.total / load.gpu.room)
    return _choice(candidate, " ".join(t.name for t in targets), False, fullest.total, fullest.gpu.room)


def _choice(candidate: _Candidate, target: str, placed: bool, peak: float, limit: float) -> Choice:
    return Choice(
        candidate.name, candidate.summary, target, placed, candidate.errors, int(peak), int(limit),
        candidate.build.disk, 0, 0, 0.0, candidate.calibrated,
    )  # fmt: skip


def _alike(choice: Choice, candidate: _Candidate) -> bool:
    """Whether the candidate is a recipe of the same size and error as the choice."""
    pairs = [(choice.weights, candidate.build.disk), (choice.errors.all, candidate.errors.all)]
    return candidate.known is None and all(abs(a - b) <= SAME_WITHIN * max(a, b) for a, b in pairs)


def _with_costs(choice: Choice, candidate: _Candidate, source: str, targets: Sequence[Target]) -> Choice:
    commands = tuple(_commands(choice, candidate, source, targets))
    if candidate.known is not None:
        needed = candidate.known.download
        return replace(choice, download=needed, disk=needed, commands=commands)
    header = TrueHeader()
    weights = sum(spec.nbytes for spec in header.specs)
    vae = candidate.build.disk - sum(stored.nbytes for stored in candidate.build.units)
    download = 0 if Path(source).exists() else weights + vae
    seconds = None if candidate.calibrated else SECONDS_PER_GB * weights / 1e9
    disk = download + choice.weights
    return replace(choice, download=download, disk=disk, build_seconds=seconds, commands=commands)


def _commands(choice: Choice, candidate: _Candidate, source: str, targets: Sequence[Target]) -> Iterator[str]:
    """The commands to run, in order: predict, build, draw a picture. A finished build needs no build commands."""
    several = len(targets) > 1
    known = candidate.known
    out = f"out/{choice.name}" if known is None else choice.name
    if known is None or not known.download:  # `budget` takes no Hub id
        yield f"bagel-compress budget {choice.name} --target {choice.target}" + (" --together" if several else "")
    if known is None:
        yield f"bagel-compress plan {choice.name}"
        if choice.calibrated:
            yield f"bagel-compress calibrate --source {source} --out {CALIBRATION}"
        given = f" --calibration {CALIBRATION}" if choice.calibrated else ""
        yield f"bagel-compress compress {choice.name} --source {source}{given} --out {out}"
    if targets[0].export is not None:
        yield f"bagel-compress export {out} {choice.target} --out {out}-{choice.target}"
        out, where = f"{out}-{choice.target}", ""
    else:
        where = f" --target {choice.target}" if choice.placed else ""
        where = " --device " + ",".join(f"cuda:{i}" for i in range(len(targets))) if several else where
    yield f'bagel-compress generate {out} "a red cat on a roof"{where} --out cat.png'
    if targets[0].export is None or targets[0].export.runtime == "onnxruntime":
        yield f"bagel-compress app {out}{where}"


def advice_table(choices: Sequence[Choice], machine: Machine) -> str:
    """The choices as a text table, and the commands of the first one."""
    row = "{:<26}{:<16}{:>8}{:>9}{:>10}{:>8}{:>10}{:>9}{:>8}".format
    lines = [row("recipe", "target", "drawing", "answers", "peak GiB", "of", "download", "disk", "build")]
    for c in choices:
        build = (
            "-"
            if c.build_seconds == 0
            else "(1)"
            if c.build_seconds is None
            else f"{max(1, round(c.build_seconds / 60))} min"
        )
        sizes = (f"{c.download / 1e9:.1f} GB" if c.download else "-", f"{c.disk / 1e9:.1f} GB" if c.disk else "-")
        peak = (f"{c.peak / GIB:.2f}", f"{c.limit / GIB:.2f}")
        lines.append(
            row(c.name, c.target, f"{100 * c.errors.gen:.1f} %", f"{100 * c.errors.und:.1f} %", *peak, *sizes, build)
        )
        if c.alike:
            lines.append(f"    the same for other loaders: {', '.join(c.alike)}")
    lines.append("drawing, answers: expected error of the weights of each expert; peaks are predicted")
    if any(c.build_seconds is None for c in choices):
        lines.append("(1) calibrated: building it runs the layers; the time was not measured, use a GPU (--device)")
    if machine.disk < min((c.disk for c in choices), default=0):
        lines.append(f"this disk has {machine.disk / 1e9:.1f} GB free: too little for any of them; free some first")
    memory = "" if machine.memory is None else f", {machine.memory / 1e9:.0f} GB of memory"
    lines.append(f"here: {', '.join(machine.gpus) or 'no GPU'}, {machine.disk / 1e9:.0f} GB of disk free{memory}")
    return "\n".join([*lines, "", f"{choices[0].name}: {choices[0].summary}", *choices[0].commands])
