"""The smoke suite: a build's regression in one command, for nightly CI. What needs no judge, on a subset.

DATA holds one folder per benchmark (mme, mmvp, mmmu, geneval); those that are there are run. GenEval also needs a
detector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bagel_compress.errors import BenchmarkError
from bagel_compress.evaluate.benchmarks import BENCHMARKS
from bagel_compress.evaluate.evaluate import Run, Scorers, digest_of, evaluate
from bagel_compress.scores.evaluation_report import EvaluationReport

LIMIT = 60  # units of each benchmark: about ten minutes of the 7B model on a GPU
SUITE = tuple(name for name, info in BENCHMARKS.items() if info.scoring in ("exact", "detector"))


def smoke(
    what: Run, scorers: Scorers, against: Path | None, say: Callable[[str], None]
) -> tuple[list[EvaluationReport], list[str]]:
    """The reports, and the benchmarks that could not be run: no folder of that name, or no detector.

    `against` is the folder of another model's smoke suite. Raises BenchmarkError if nothing can be run.
    """

    def ready(name: str) -> bool:
        needs_detector = BENCHMARKS[name].scoring == "detector"
        return (Path(what.data) / name).is_dir() and not (needs_detector and not (scorers.detector and scorers.clip))

    present = [name for name in SUITE if ready(name)]
    if not present:
        raise BenchmarkError(
            f"{what.data} holds no folder of the smoke suite; expected one or more of {', '.join(SUITE)}"
            " (docs/evaluation.md)."
        )
    what, reports = replace(what, digest=digest_of(what.model), limit=what.limit or LIMIT), []
    for name in present:
        part = replace(
            what, benchmark=name, data=str(Path(what.data) / name), out=str(Path(what.out) / name),
            pictures=what.pictures or (1 if BENCHMARKS[name].scoring == "detector" else 0),
        )  # fmt: skip
        report = evaluate(part, replace(scorers, against=against / name if against else None), say=say)
        if report is not None:
            reports.append(report)
    return reports, [name for name in SUITE if name not in present]
