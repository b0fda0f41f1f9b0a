"""evaluate: a benchmark's files and a model in, pictures or answers and a report out.

`run_part` asks one process's share and is a job that travels to other processes and machines; `finish` scores when all
parts are there. `evaluate` does both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bagel.settings import FlowSettings
from bagel_compress.build.artifact import Artifact
from bagel_compress.build.manifest import EXPORT_MANIFEST, MANIFEST
from bagel_compress.errors import BenchmarkError
from bagel_compress.evaluate import read_pictures, read_understanding
from bagel_compress.evaluate.benchmarks import BenchmarkInfo, benchmark_info
from bagel_compress.evaluate.exact import score_mme, score_mmmu, score_mmvp
from bagel_compress.evaluate.items import BenchmarkItems, Item, ItemPicture, check_damage
from bagel_compress.evaluate.judge import Judge
from bagel_compress.evaluate.judged import score_judged
from bagel_compress.evaluate.runner import (
    RunSettings,
    Shard,
    answers_of,
    picture_of,
    read_settings,
    run,
    skipped_of,
    subset,
    unfinished,
)
from bagel_compress.evaluate.values import Values, load_values, save_values, scored
from bagel_compress.io.jobs import Executor, run_jobs
from bagel_compress.report.files import write_pages_again
from bagel_compress.scores.evaluation_report import EvaluationReport, JudgeUse
from bagel_compress.source.checkpoint import Checkpoint

if TYPE_CHECKING:
    from bagel.loops import Loops

SIDE = 1024  # of the official pictures
EXACT = {"mme": score_mme, "mmvp": score_mmvp, "mmmu": score_mmmu}


@dataclass(frozen=True)
class Run:
    """What to run; plain values, so that it travels. None and 0 leave the official value."""

    benchmark: str
    model: str
    data: str
    out: str
    device: str = "cpu"
    dtype: str = "bf16"
    think: bool = False
    seed: int = 42
    limit: int = 0
    steps: int = 0
    side: int = 0  # of drawn pictures, pixels
    pictures: int = 0  # per prompt
    batch: int = 8
    digest: str = ""  # of the model; found out where it is not given
    shard: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class Scorers:
    """What scores need besides the answers: folders of models for GenEval, a judge, an earlier run to compare with."""

    detector: str | None = None
    clip: str | None = None
    judge: Judge | None = None
    against: Path | None = None
    device: str = "cpu"


def read_items(info: BenchmarkInfo, data: Path, pictures: int) -> BenchmarkItems:
    """The benchmark's items. Raises BenchmarkError if a file is missing or too much of it is damaged."""
    if not data.is_dir():
        raise BenchmarkError(f"{data} is no folder; expected the data of {info.title} (docs/evaluation.md).")
    readers: dict[str, Callable[[], BenchmarkItems]] = {
        "mme": lambda: read_understanding.read_mme(data),
        "mmmu": lambda: read_understanding.read_mmmu(data),
        "mmvp": lambda: read_understanding.read_mmvp(data),
        "geneval": lambda: read_pictures.read_geneval(data, pictures),
        "geneval-rewritten": lambda: read_pictures.read_geneval(data, pictures, next(iter(info.files))),
        "wise": lambda: read_pictures.read_wise(data),
        "dpg": lambda: read_pictures.read_prompt_files(data),
        "gedit": lambda: read_pictures.read_gedit(data),
        "imgedit": lambda: read_pictures.read_imgedit(data),
        "kris": lambda: read_pictures.read_kris(data),
        "rise": lambda: read_pictures.read_rise(data),
        "intelligentbench": lambda: read_pictures.read_edit_list(data),
    }
    return readers[info.name]()


def evaluate(
    what: Run,
    scorers: Scorers = Scorers(),
    processes: int = 1,
    executor: Executor = "local",
    cluster: str | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> EvaluationReport | None:
    """Runs the benchmark in this process, in several or on Ray, and scores it; None if other parts are missing.

    With processes > 1, `what.device` may name several devices by commas, which the parts take in turn. Raises
    BenchmarkError on data, settings or a judge that cannot be, and what opening the model raises.
    """
    benchmark_info(what.benchmark)
    if what.shard != (0, 1) and processes > 1:
        raise BenchmarkError("--shard and --processes exclude each other: a shard is one process.")
    what = what if what.digest else replace(what, digest=digest_of(what.model))
    if processes > 1 or executor == "ray":
        devices = what.device.split(",")
        parts = [replace(what, device=devices[i % len(devices)], shard=(i, processes)) for i in range(processes)]
        for part in run_jobs(run_part, parts, processes, executor, cluster):
            say(part)
    else:
        say(run_part(what, say))
    return finish(what, scorers)


def run_part(what: Run, say: Callable[[str], None] | None = None) -> str:
    """Asks the share of one process; says in a sentence what was done."""
    info, settings, items, _ = _prepared(what)
    shard = Shard(*what.shard)

    def progress(done: int, of: int) -> None:
        if say is not None and (done == of or done % max(1, of // 20) == 0):
            say(f"{info.name}: {done} of {of}")

    run(settings, items, lambda: open_any(what.model, what.device, what.dtype), Path(what.out), shard, what.batch,
        progress)  # fmt: skip
    return f"{info.name}: part {shard.index + 1} of {shard.count} done"


def finish(what: Run, scorers: Scorers = Scorers()) -> EvaluationReport | None:
    """Scores a run whose parts are all there and writes its report; None if some are missing."""
    info, settings, items, reading = _prepared(what)
    out = Path(what.out)
    if unfinished(out, items):
        return None
    not_opened = skipped_of(out)
    check_damage(list(not_opened.values()), len(items), str(out), "pictures")
    items = [item for item in items if item.id not in not_opened]
    values, judge, notes = _score(info, items, out, Path(what.data), scorers)
    against = None
    if scorers.against is not None:
        _check_reference(settings, scorers.against)
        against = load_values(scorers.against)
    if values is not None:
        save_values(values, out)
    official = info.thinking if what.think else info.official
    report = EvaluationReport(
        benchmark=info.name, title=info.title, model=what.model, digest=settings.model,
        measured_by=f"bagel-compress {version('bagel-compress')}", measured_on=_machine(what),
        differs=tuple(_differs(info, settings, judge)), items=len(items),
        skipped=(*reading.skipped, *not_opened.values()),
        scores=() if values is None else scored(values, official, against), judge=judge, notes=tuple(notes),
        reference=read_settings(scorers.against)["model"][:12] if scorers.against else "",
    )  # fmt: skip
    report.save(out)
    if any((Path(what.model) / name).is_file() for name in (MANIFEST, EXPORT_MANIFEST)):
        report.attach(Path(what.model))
        write_pages_again(Path(what.model), settings.model)
    return report


def _prepared(what: Run) -> tuple[BenchmarkInfo, RunSettings, list[Item], BenchmarkItems]:
    info = benchmark_info(what.benchmark)
    pictures = what.pictures or info.pictures
    reading = read_items(info, Path(what.data), pictures)
    flow = replace(info.flow, num_timesteps=what.steps) if what.steps else info.flow
    side = what.side or SIDE
    digest = what.digest or digest_of(what.model)
    settings = RunSettings(
        info.name, digest, data_digest(reading.items), flow, info.text, (side, side), pictures, what.think, what.seed,
        what.limit, what.dtype,
    )  # fmt: skip
    return info, settings, subset(reading.items, what.limit), reading


def _score(
    info: BenchmarkInfo, items: Sequence[Item], out: Path, data: Path, scorers: Scorers
) -> tuple[Values | None, JudgeUse | None, list[str]]:
    """Values, what a judge did, and why there are none where a scorer is missing."""
    if info.scoring == "exact":
        return EXACT[info.name](items, answers_of(out)), None, []
    if info.scoring == "detector":
        if scorers.detector is None or scorers.clip is None:
            return None, None, ["Not scored: GenEval needs --detector DIR and --clip DIR, or its own scripts."]
        from bagel_compress.evaluate.detectors import open_colors, open_detector
        from bagel_compress.evaluate.geneval import score_geneval

        seen, colors = open_detector(scorers.detector, scorers.device), open_colors(scorers.clip)
        return score_geneval(items, out, seen, colors), None, []
    if info.scoring == "judge":
        if scorers.judge is None:
            return None, None, ["Not scored: it needs a judge (--judge URL --judge-model M), or its own scripts."]
        values, use = score_judged(info, items, lambda item: picture_of(out, item), data, out, scorers.judge)
        return values, use, []
    return None, None, [f"Not scored: {info.title} is judged by its own scripts; the pictures are in their layout."]


def _check_reference(settings: RunSettings, reference: Path) -> None:
    """Raises BenchmarkError if the reference was run with other settings; the model and its dtype may differ."""
    own, other = settings.to_json(), read_settings(reference)
    for key in own:
        if key not in ("model", "dtype") and other.get(key) != own[key]:
            raise BenchmarkError(
                f"{reference} was run with another {key} ({json.dumps(other.get(key))}, now {json.dumps(own[key])});"
                " a paired difference needs the same settings."
            )


def _differs(info: BenchmarkInfo, settings: RunSettings, judge: JudgeUse | None) -> list[str]:
    """Where a run is not the official one, a phrase each."""
    found = []
    for field in fields(FlowSettings):
        own, official = getattr(settings.flow, field.name), getattr(info.flow, field.name)
        if own != official:
            found.append(f"{field.name} {own} instead of {official}")
    if settings.size != (SIDE, SIDE) and info.group == "text to image":
        found.append(f"pictures of {settings.size[1]} instead of {SIDE} pixels")
    if settings.pictures != info.pictures:
        found.append(f"{settings.pictures} pictures a prompt instead of {info.pictures}")
    if settings.limit:
        found.append(f"a subset of {settings.limit} units")
    if judge is not None and judge.model != info.official_judge:
        found.append(f"judged by {judge.model} instead of {info.official_judge}")
    return found


def data_digest(items: Sequence[Item]) -> str:
    """sha256 of what is asked: ids, texts, sizes of files of pictures."""
    found = hashlib.sha256()
    for item in items:
        row: list[Any] = [item.id, item.category, item.unit]
        for turn in item.turns:
            row.append(turn if isinstance(turn, str) else _picture_mark(turn))
        found.update(json.dumps(row).encode())
    return found.hexdigest()


def _picture_mark(picture: ItemPicture) -> list[Any]:
    if isinstance(picture.source, bytes):
        return [hashlib.sha256(picture.source).hexdigest(), picture.scale]
    return [picture.source.name, picture.source.stat().st_size, picture.scale]


def digest_of(model: str) -> str:
    """Identity of a model: of an artifact's or export's manifest, or of all values of a checkpoint."""
    folder = _folder(model)
    if (folder / EXPORT_MANIFEST).is_file():
        from bagel_compress.exporting.manifest import ExportFolder

        return ExportFolder.open(folder).digest
    if (folder / MANIFEST).is_file():
        return Artifact.open(folder).digest
    return Checkpoint.open(folder).digest


def open_any(model: str, device: str, dtype: str) -> Loops:
    """A checkpoint, artifact or export, ready to sample."""
    folder = _folder(model)
    if (folder / EXPORT_MANIFEST).is_file():
        from bagel_compress.exporting.ort_sampler import open_onnx

        return open_onnx(folder, device.partition(":")[0])
    import torch

    from bagel_compress.budgets.device_option import one_device
    from bagel_compress.run.load import open_model

    return open_model(folder, one_device(device), torch.float32 if dtype == "fp32" else None)


def _folder(model: str) -> Path:
    from bagel_compress.run.load import downloaded

    return Path(model) if Path(model).exists() else downloaded(model)


def _machine(what: Run) -> str:
    """Device and versions: what a figure was measured on."""
    import platform

    import torch

    name = platform.machine() + " CPU"
    if what.device.startswith("cuda"):
        name = torch.cuda.get_device_name(torch.device(what.device.split(",")[0]))
    return f"{name}, torch {torch.__version__}, {what.dtype}"
