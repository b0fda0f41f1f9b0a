"""The verb export: an artifact or checkpoint as ONNX graphs, and as TensorRT engines where the target says so."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bagel_compress.cli import add_json, emit

if TYPE_CHECKING:
    from bagel_compress.artifact import Artifact
    from bagel_compress.export.manifest import ExportFolder


def register(verbs: Any) -> None:
    """Adds the parser of export."""
    export = verbs.add_parser(
        "export",
        help="write ONNX graphs or TensorRT engines, block by block; run again to go on",
        description="Write ONNX graphs or TensorRT engines, block by block; run again to go on.",
        epilog="examples:\n  bagel-compress export out/int8 ort-cpu --out out/int8-onnx\n"
        "  bagel-compress export out/fp8 trt-rtx4090-24gb --out out/fp8-rtx\n"
        "  bagel-compress export out/int8 ort-cpu --out out/int8-onnx --trace bagel.trace.safetensors\n"
        '  bagel-compress generate out/int8-onnx "a red cat"',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument("source", metavar="ARTIFACT", help="artifact folder, or full-precision checkpoint folder")
    export.add_argument("target", metavar="TARGET", help="target file with an `export` section, or a packaged name")
    export.add_argument(
        "--out", required=True, metavar="DIR", help="folder of the export: new, or begun by this command"
    )
    export.add_argument("--trace", nargs="+", metavar="FILE", help="compare the graphs with these traces of the source")
    export.add_argument(
        "--verify", action="store_true", help="of a finished DIR: read every byte, compare with manifest"
    )
    add_json(export)
    export.set_defaults(verb=_export)


def _export(args: argparse.Namespace) -> int:
    from bagel_compress.export.manifest import MANIFEST, ExportFolder

    out = Path(args.out)
    finished = (out / MANIFEST).exists() and (args.verify or args.trace)
    folder = ExportFolder.open(out) if finished else _made(args, out)
    faults = folder.verify() if args.verify else []
    data: dict[str, Any] = {"path": str(out), "digest": folder.digest, "blocks": blocks_of(folder), "faults": faults}
    lines = [summary(folder), *faults]
    passed = not faults
    if args.trace:
        from bagel_compress.validate.exported import validate_export

        report = validate_export(folder, args.trace)
        passed = passed and report.passed
        data["parity"] = report.model_dump(mode="json") | {"passed": report.passed}
        lines += [f"parity: {'passed' if report.passed else 'broken'}", *report.faults, *report.broken]
    emit(args, data, "\n".join(lines))
    return 0 if passed else 1


def _made(args: argparse.Namespace, out: Path) -> ExportFolder:
    from tqdm import tqdm

    from bagel_compress.export.build import export
    from bagel_compress.export.source import Source
    from bagel_compress.target import Target

    with tqdm(unit="file", desc="export", leave=False, disable=args.json or None) as bar:

        def step(name: str, done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.set_postfix_str(name)

        return export(Source.open(args.source), Target.load(args.target), out, step)


def follow_recipe(artifact: Artifact, trace: Path) -> tuple[dict[str, Any], str, bool]:
    """Exports an artifact for its recipe's target, beside it, and judges the graphs by the trace.

    Gives the data for --json, the lines for people, and whether everything passed. Engines are built and not judged.
    """
    from bagel_compress.export.build import export
    from bagel_compress.export.manifest import MANIFEST, ExportFolder
    from bagel_compress.export.source import ArtifactSource
    from bagel_compress.target import Target
    from bagel_compress.validate.exported import validate_export

    target = Target.load(artifact.manifest.recipe.export or "")
    out = artifact.path.with_name(f"{artifact.path.name}-{target.name}")
    done = (out / MANIFEST).exists() and ExportFolder.open(out).manifest.source["digest"] == artifact.digest
    folder = ExportFolder.open(out) if done else export(ArtifactSource(artifact), target, out)
    data: dict[str, Any] = {"path": str(out), "digest": folder.digest, "blocks": blocks_of(folder)}
    if folder.manifest.settings.runtime != "onnxruntime":
        return data, summary(folder), True
    report = validate_export(folder, [trace])
    data["parity"] = report.model_dump(mode="json") | {"passed": report.passed}
    lines = [summary(folder), f"parity: {'passed' if report.passed else 'broken'}", *report.faults, *report.broken]
    return data, "\n".join(lines), report.passed


def blocks_of(folder: ExportFolder) -> list[dict[str, Any]]:
    """One row per block: kind, files, sizes, forms of its matrices."""
    files = folder.manifest.files
    return [
        {
            "block": name, "kind": entry.kind, "model": entry.model, "engine": entry.engine, "forms": entry.forms,
            "nodes": sum(entry.nodes.values()), "weight_bytes": sum(w.bytes for w in entry.weights.values()),
            "engine_bytes": files[entry.engine].bytes if entry.engine else 0,
        }
        for name, entry in folder.manifest.blocks.items()
    ]  # fmt: skip


def summary(folder: ExportFolder) -> str:
    """What was exported, and what was not run."""
    manifest = folder.manifest
    stored = sum(entry.bytes for entry in manifest.files.values())
    text = (
        f"{folder.path}: {len(manifest.blocks)} blocks for {manifest.settings.runtime} in {manifest.settings.precision}"
        f", {stored:,} bytes; export {folder.digest[:12]}"
    )
    if manifest.settings.runtime != "onnxruntime":
        text += "\nengines were built, not run: running them needs the card."
    return text
