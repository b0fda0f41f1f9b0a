"""The verbs trace, validate, compare, report, check and budget."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bagel_compress.cli import add_json, add_verb, emit, say
from bagel_compress.cli.build import add_base_and_lora, open_checkpoint

if TYPE_CHECKING:
    from bagel_compress.parity.report_data import BudgetReport, ParityReport

_SHORT = {
    "understanding expert": "und", "generation expert": "gen", "embeddings and head": "embed, head",
    "ViT, bridges, VAE": "vit, vae", "activations and scratch": "activations", "CUDA context": "context",
    "adapters and moments": "adapters",
}  # fmt: skip


def register(verbs: Any) -> None:
    """Adds this group's parsers to `verbs` (an argparse sub-parsers action)."""
    _add_trace(verbs)
    _add_validate_and_check(verbs)
    _add_budget(verbs)
    comparison = add_verb(
        verbs, "compare", "compare builds of one source with the same traces, on one page",
        "bagel-compress compare out/nf4 out/fp8 --trace bagel.trace.safetensors --out compared.html",
    )  # fmt: skip
    comparison.add_argument("builds", nargs="+", metavar="BUILD", help="two or more artifact folders")
    comparison.add_argument("--trace", required=True, nargs="+", metavar="FILE", help="traces of their source")
    comparison.add_argument("--out", type=Path, default=Path("compared.html"), metavar="HTML", help="(%(default)s)")
    _device(comparison)
    add_json(comparison)
    comparison.set_defaults(verb=_compare)

    report = add_verb(
        verbs,
        "report",
        "write report.html again from the JSON reports of an artifact or export",
        "bagel-compress report out/nf4",
    )
    report.add_argument("artifact", metavar="ARTIFACT")
    add_json(report)
    report.set_defaults(verb=_report)


def _add_trace(verbs: Any) -> None:
    trace = add_verb(
        verbs, "trace", "record the full-precision model on each case; run it again to continue",
        "bagel-compress trace exports/cases --source BAGEL-7B-MoT --out bagel.trace.safetensors --device cuda",
    )  # fmt: skip
    trace.add_argument("cases", nargs="+", metavar="CASE", help="case file, or folder of them")
    trace.add_argument("--source", required=True, metavar="DIR", help="full-precision checkpoint folder")
    add_base_and_lora(trace)
    trace.add_argument("--out", required=True, metavar="FILE")
    _device(trace)
    trace.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    trace.add_argument(
        "--floor", choices=("all", "kernel", "none"), default="all",
        help="noise floor to measure; `all` also runs the model in the other dtype (fp32: twice the memory)",
    )  # fmt: skip
    add_json(trace)
    trace.set_defaults(verb=_trace)


def _add_validate_and_check(verbs: Any) -> None:
    validate = add_verb(
        verbs, "validate", "compare an artifact with its reference and write report.html; exit 1 on a broken limit",
        "bagel-compress validate out/nf4 --trace bagel.trace.safetensors\n"
        "  bagel-compress validate out/nf4 --trace a.safetensors b.safetensors --source BAGEL-7B-MoT",
    )  # fmt: skip
    _artifact_and_traces(validate)
    validate.add_argument("--source", metavar="DIR", help="the checkpoint, to attribute errors to components")
    add_base_and_lora(validate)
    validate.add_argument("--lpips", metavar="FILE", help="AlexNet and LPIPS weights (safetensors), to measure LPIPS")
    validate.add_argument("--clip", metavar="DIR", help="CLIP model in the layout of the Hub, to measure CLIP scores")
    validate.set_defaults(verb=_validate)

    check = add_verb(
        verbs, "check", "validate an artifact and its budget, for CI; exit 1 and a sentence per broken limit",
        "bagel-compress check out/nf4 --trace bagel.trace.safetensors --target 12gb",
    )  # fmt: skip
    _artifact_and_traces(check, several=False)
    _targets(check)
    check.set_defaults(verb=_check)


def _add_budget(verbs: Any) -> None:
    budget = add_verb(
        verbs, "budget", "predict the peak memory on a GPU, phase by phase, without one; exit 1 if it does not fit",
        "bagel-compress budget nf4 --target 12gb 16gb\n  bagel-compress budget out/nf4 --target h100 --device cuda\n"
        "  bagel-compress budget out/nf4 --target 12gb --device cpu --source BAGEL-7B-MoT\n"
        "  bagel-compress budget fp8-24gb --target 12gb 12gb --together",
    )  # fmt: skip
    budget.add_argument("build", metavar="ARTIFACT|RECIPE", help="artifact folder; recipe file or packaged name")
    _targets(budget)
    budget.add_argument(
        "--task",
        choices=("sample", "finetune"),
        default="sample",
        help="the target's tasks (default), or a training step",
    )
    budget.add_argument(
        "--config",
        metavar="CONFIG",
        help="with --task finetune: the fine-tuning config (default: rank 16, 4096 tokens)",
    )
    budget.add_argument(
        "--source", metavar="SRC",
        help="with a recipe: checkpoint to plan for (default: the released one); with an artifact and --device:"
        " full-precision model to compare times with",
    )  # fmt: skip
    budget.add_argument(
        "--device", metavar="D", help="also measure on this CUDA device, if it is the target's; cpu: times only"
    )
    budget.add_argument(
        "--together", action="store_true",
        help="the targets are GPUs of one machine: plan which layers and parts go to which",
    )  # fmt: skip
    add_json(budget)
    budget.set_defaults(verb=_budget)


def _targets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target", required=True, nargs="+", metavar="T", help="target file, or the name of a packaged one"
    )


def _device(parser: argparse.ArgumentParser, several: bool = True) -> None:
    more = ", or several: cuda:0,cuda:1" if several else ""
    parser.add_argument("--device", default="cpu", help=f"cpu, cuda, cuda:1{more} (default cpu)")


def _artifact_and_traces(parser: argparse.ArgumentParser, several: bool = True) -> None:
    parser.add_argument("artifact", metavar="ARTIFACT", help="folder that `compress` or `export` wrote")
    parser.add_argument("--trace", required=True, nargs="+", metavar="FILE", help="traces of the artifact's source")
    _device(parser, several)
    add_json(parser)


def _trace(args: argparse.Namespace) -> int:
    import torch

    from bagel_compress.budgets.device_option import choose_device, one_device
    from bagel_compress.run.case import load_cases
    from bagel_compress.validation.artifact import record_source

    floors = {"all": ("repeat", "kernel", "dtype"), "kernel": ("repeat", "kernel"), "none": ()}[args.floor]
    dtype = getattr(torch, args.dtype)
    device = choose_device(args.device, args.source, say) if dtype == torch.bfloat16 else one_device(args.device)
    file = record_source(open_checkpoint(args), load_cases(args.cases), args.out, device, dtype, floors, say)
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
    from bagel_compress.build.manifest import EXPORT_MANIFEST
    from bagel_compress.parity.network_metrics import Networks
    from bagel_compress.validation.artifact import validate_artifact

    if (Path(args.artifact) / EXPORT_MANIFEST).exists():
        from bagel_compress.exporting.manifest import ExportFolder
        from bagel_compress.validation.export import validate_export

        report = validate_export(ExportFolder.open(args.artifact), args.trace, progress=say)
    else:
        source = None if args.source is None else open_checkpoint(args)
        networks = Networks.open(args.lpips, args.clip)
        report = validate_artifact(args.artifact, args.trace, source, args.device, say, networks)
    page = Path(args.artifact) / "report.html"
    emit(args, report.model_dump(mode="json") | {"passed": report.passed, "page": str(page)}, table(report, page))
    return 0 if report.passed else 1


def _compare(args: argparse.Namespace) -> int:
    from bagel_compress.errors import InputError
    from bagel_compress.io.atomic import write_atomic
    from bagel_compress.validation.compare_builds import compare_builds, page

    if len(args.builds) < 2:
        raise InputError(f"compare takes two or more builds, found only {args.builds[0]}; use `validate` for one.")
    builds = compare_builds([Path(build) for build in args.builds], args.trace, args.device, say)
    write_atomic(args.out, page(builds, args.trace))
    lines = [
        f"{b.name}: {b.artifact.nbytes:,} bytes, {'passed' if b.report.passed else 'did not pass'}" for b in builds
    ]
    emit(args, {"builds": [b.to_json() for b in builds], "page": str(args.out)}, "\n".join([*lines, str(args.out)]))
    return 0


def _check(args: argparse.Namespace) -> int:
    from bagel_compress.budgets.device_option import one_device
    from bagel_compress.validation.check import check

    report, budgets = check(args.artifact, args.trace, args.target, one_device(args.device), say)
    page = Path(args.artifact) / "report.html"
    passed = report.passed and not any(b.broken for b in budgets)
    data = {"passed": passed, "parity": report.model_dump(mode="json"), "page": str(page)}
    text = "\n\n".join([table(report, page), *map(budget_table, budgets)])
    emit(args, data | {"budgets": [b.model_dump(mode="json") for b in budgets]}, text)
    return 0 if passed else 1


def _budget(args: argparse.Namespace) -> int:
    if args.together:
        return _together(args)
    if args.task == "finetune":
        return _budget_of_training(args)
    from bagel_compress.validation.check import budgets_of

    reports = budgets_of(args.build, args.target, args.source, args.device)
    emit(args, {"budgets": [r.model_dump(mode="json") for r in reports]}, "\n\n".join(map(budget_table, reports)))
    return 1 if any(r.broken for r in reports) else 0


def _budget_of_training(args: argparse.Namespace) -> int:
    from bagel_compress.budgets.device_option import outline_of
    from bagel_compress.budgets.planned_build import planned_build
    from bagel_compress.build.manifest import MANIFEST
    from bagel_compress.errors import TargetError
    from bagel_compress.finetune.config import FinetuneConfig
    from bagel_compress.finetune.memory import predict_finetune
    from bagel_compress.run.target import Target

    if args.device is not None:
        raise TargetError("--task finetune is predicted, not measured; leave out --device.")
    usual = FinetuneConfig.model_validate({"model": args.build, "steps": 1, "lora": {}})
    config = FinetuneConfig.load(args.config) if args.config else usual
    is_folder = (Path(args.build) / MANIFEST).exists()
    build = outline_of(Path(args.build)) if is_folder else planned_build(args.build, args.source)
    reports = [predict_finetune(build, Target.load(target), config) for target in args.target]
    emit(args, {"budgets": [r.model_dump(mode="json") for r in reports]}, "\n\n".join(map(budget_table, reports)))
    return 1 if any(r.broken for r in reports) else 0


def _together(args: argparse.Namespace) -> int:
    from bagel_compress.budgets.device_option import outline_of
    from bagel_compress.budgets.plan_devices import gpu_of, plan_map
    from bagel_compress.budgets.planned_build import planned_build
    from bagel_compress.build.manifest import MANIFEST
    from bagel_compress.errors import TargetError
    from bagel_compress.run.target import Target

    if args.device is not None:
        raise TargetError("--together plans from the targets' memory and measures nothing; leave out --device.")
    targets = [Target.load(target) for target in args.target]
    is_folder = (Path(args.build) / MANIFEST).exists()
    build = outline_of(Path(args.build)) if is_folder else planned_build(args.build, args.source)
    plan = plan_map(build, [gpu_of(t, f"cuda:{i}") for i, t in enumerate(targets)], targets[0].sizes)
    emit(args, plan.to_json(), f"{build.name} on {' + '.join(t.name for t in targets)}, GiB\n{plan.table()}")
    return 0


def budget_table(report: BudgetReport) -> str:
    """A budget report as text: peaks by phase in GiB, measured times, verdict and advice."""
    from bagel_compress.parity.report_data import TOKEN

    names = list(report.phases[0].parts)
    short = [_SHORT.get(name, name) for name in names]
    how = f"measured on {report.measured_on}" if report.measured_on else "predicted"
    lines = [
        f"{report.name} on {report.target} ({report.device}), {how}, GiB; disk {report.disk / 1e9:.2f} GB",
        f"{'phase':<24}{'peak':>8}" + "".join(f"{name:>12}" for name in short),
    ]
    for phase in report.phases:
        parts = "".join(f"{phase.parts[name] / 2**30:>12.2f}" for name in names)
        measured = "" if phase.measured is None else f"   measured {phase.measured / 2**30:.2f}"
        lines.append(f"{phase.name:<24}{phase.total / 2**30:>8.2f}{parts}{measured}")
    if report.timings:
        lines.append(f"{'times on ' + (report.timed_on or 'unknown'):<24}")
        lines.append(f"{'':<24}{'median s':>12}{'90 % s':>12}{'reference s':>12}{'ratio':>8}")
    for t in report.timings:
        beside = "" if t.ratio is None else f"{t.reference:>12.4g}{t.ratio:>8.2f}"
        speed = f"   {1 / t.median:.1f} tokens/s" if t.what == TOKEN else ""
        lines.append(f"{t.what:<24}{t.median:>12.4g}{t.p90:>12.4g}{beside}{speed}")
    fits = f"fits: {report.peak / 2**30:.2f} of {(report.limit or 0) / 2**30:.2f} GiB" if not report.broken else ""
    return "\n".join([*lines, *filter(None, [fits, *report.broken, *report.advice])])


def _report(args: argparse.Namespace) -> int:
    from bagel_compress.build.artifact import Artifact
    from bagel_compress.build.manifest import EXPORT_MANIFEST
    from bagel_compress.exporting.manifest import ExportFolder
    from bagel_compress.report.files import write_pages

    exported = (Path(args.artifact) / EXPORT_MANIFEST).exists()
    build = ExportFolder.open(args.artifact) if exported else Artifact.open(args.artifact)
    page = write_pages(args.artifact, build.digest)
    emit(args, {"page": str(page)}, str(page))
    return 0


def table(report: ParityReport, page: Path) -> str:
    """A parity report as text: the worst value of each metric, the broken limits and faults, the path of the page."""
    from bagel_compress.build.limits import METRICS
    from bagel_compress.parity.report_data import number
    from bagel_compress.report.text import worst_rows

    lines = [f"{'metric':<18}{'worst case':<18}{'found':>10}{'floor':>10}{'limit':>12}"]
    for row in worst_rows(report):
        side = "<=" if METRICS[row.metric].sense == "max" else ">="
        floor = "" if row.floor is None else number(row.floor)
        limit = f"{side} {number(row.limit)}"
        mark = "" if row.ok else "  broken"
        lines.append(f"{row.metric:<18}{row.case or 'all':<18}{number(row.value):>10}{floor:>10}{limit:>12}{mark}")
    lines += [*report.faults, *report.broken]
    return "\n".join([*lines, f"{report.name}: {'passed' if report.passed else 'did not pass'}", f"{page}"])
