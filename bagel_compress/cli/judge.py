"""Verbs that judge: trace, validate, report; check and budget against a target."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bagel_compress.cli import add_json, emit

if TYPE_CHECKING:
    from bagel_compress.reports import ParityReport


def register(verbs: Any) -> None:
    """Adds this group's parsers to `verbs` (an argparse sub-parsers action)."""
    trace = _verb(
        verbs, "trace", "record what the full-precision model does, case by case; run again to go on",
        "bagel-compress trace exports/cases --source BAGEL-7B-MoT --out bagel.trace.safetensors --device cuda",
    )  # fmt: skip
    trace.add_argument("cases", nargs="+", metavar="CASE", help="case file, or folder of them")
    trace.add_argument("--source", required=True, metavar="DIR", help="full-precision checkpoint folder")
    trace.add_argument("--out", required=True, metavar="FILE")
    _device(trace)
    trace.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    trace.add_argument(
        "--floor", choices=("all", "kernel", "none"), default="all",
        help="noise floor to measure; `all` also runs the model in the other dtype (fp32: twice the memory)",
    )  # fmt: skip
    add_json(trace)
    trace.set_defaults(verb=_trace)

    validate = _verb(
        verbs, "validate", "compare an artifact with its reference and write report.html; exit 1 on a broken limit",
        "bagel-compress validate out/nf4 --trace bagel.trace.safetensors\n"
        "  bagel-compress validate out/nf4 --trace a.safetensors b.safetensors --source BAGEL-7B-MoT",
    )  # fmt: skip
    _artifact_and_traces(validate)
    validate.add_argument("--source", metavar="DIR", help="the checkpoint, to attribute errors to components")
    validate.set_defaults(verb=_validate)

    report = _verb(
        verbs, "report", "draw report.html again from the reports beside an artifact", "bagel-compress report out/nf4"
    )
    report.add_argument("artifact", metavar="ARTIFACT")
    add_json(report)
    report.set_defaults(verb=_report)


def _verb(verbs: Any, name: str, text: str, examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=f"examples:\n  {examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    return parser


def _device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default cpu)")


def _artifact_and_traces(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", metavar="ARTIFACT", help="folder that `compress` wrote")
    parser.add_argument("--trace", required=True, nargs="+", metavar="FILE", help="traces of the artifact's source")
    _device(parser)
    add_json(parser)


def _trace(args: argparse.Namespace) -> int:
    import torch

    from bagel_compress.case import load_cases
    from bagel_compress.validate.judge import record_source

    floors = {"all": ("repeat", "kernel", "dtype"), "kernel": ("repeat", "kernel"), "none": ()}[args.floor]
    dtype = getattr(torch, args.dtype)
    file = record_source(args.source, load_cases(args.cases), args.out, args.device, dtype, floors, _say)
    size = file.path.stat().st_size
    data = {
        "trace": str(file.path),
        "bytes": size,
        "source": file.header.source_digest,
        "cases": list(file.header.cases),
    }
    emit(args, data, f"{file.path}: {len(file.header.cases)} cases, {size / 1e6:.1f} MB")
    return 0


def _validate(args: argparse.Namespace) -> int:
    from bagel_compress.validate.judge import validate_artifact

    report = validate_artifact(args.artifact, args.trace, args.source, args.device, _say)
    page = Path(args.artifact) / "report.html"
    emit(args, report.model_dump(mode="json") | {"passed": report.passed, "page": str(page)}, table(report, page))
    return 0 if report.passed else 1


def _report(args: argparse.Namespace) -> int:
    from bagel_compress.artifact import Artifact
    from bagel_compress.validate.judge import write_report

    page = write_report(args.artifact, Artifact.open(args.artifact).digest)
    emit(args, {"page": str(page)}, str(page))
    return 0


def table(report: ParityReport, page: Path) -> str:
    """The verdict as text: the worst value of each metric, then reasons and the page."""
    from bagel_compress.limits import METRICS
    from bagel_compress.report_text import worst_rows
    from bagel_compress.reports import number

    lines = [f"{'metric':<18}{'worst case':<18}{'found':>10}{'floor':>10}{'limit':>12}"]
    for row in worst_rows(report):
        side = "<=" if METRICS[row.metric][0] == "max" else ">="
        floor = "" if row.floor is None else number(row.floor)
        limit = f"{side} {number(row.limit)}"
        mark = "" if row.ok else "  broken"
        lines.append(f"{row.metric:<18}{row.case or 'all':<18}{number(row.value):>10}{floor:>10}{limit:>12}{mark}")
    lines += [*report.faults, *report.broken]
    return "\n".join([*lines, f"{report.name}: {'passed' if report.passed else 'did not pass'}", f"{page}"])


def _say(message: str) -> None:
    print(message, file=sys.stderr)
