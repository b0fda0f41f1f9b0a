"""The verb export: writes an artifact or checkpoint as ONNX graphs, and as TensorRT engines if the target has them."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bagel_compress.cli import add_json, emit

if TYPE_CHECKING:
    from bagel_compress.build.artifact import Artifact
    from bagel_compress.exporting.manifest import ExportFolder
    from bagel_compress.parity.report_data import ParityReport


def register(verbs: Any) -> None:
    """Adds the parser of export."""
    export = verbs.add_parser(
        "export",
        help="write ONNX graphs or TensorRT engines, block by block; run it again to continue",
        description="Write ONNX graphs or TensorRT engines, block by block; run it again to continue.",
        epilog="examples:\n  bagel-compress export out/int8 ort-cpu --out out/int8-onnx\n"
        "  bagel-compress export out/fp8 trt-rtx4090-24gb --out out/fp8-rtx\n"
        "  bagel-compress export out/int8 ort-cpu --out out/int8-onnx --trace bagel.trace.safetensors\n"
        '  bagel-compress generate out/int8-onnx "a red cat"',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument("source", metavar="ARTIFACT", help="artifact folder, or full-precision checkpoint folder")
    export.add_argument("target", metavar="TARGET", help="target file with an `export` section, or a packaged name")
    export.add_argument(
        "--out", required=True, metavar="DIR", help="folder of the export: new, or an unfinished export of this kind"
    )
    export.add_argument("--trace", nargs="+", metavar="FILE", help="compare the graphs with these traces of the source")
    export.add_argument(
        "--verify", action="store_true", help="read every byte of a finished export and compare it with the manifest"
    )
    add_json(export)
    export.set_defaults(verb=_export)


def _export(args: argparse.Namespace) -> int:
    from bagel_compress.exporting.manifest import MANIFEST, ExportFolder

    out = Path(args.out)
    finished = (out / MANIFEST).exists() and (args.verify or args.trace)
    folder = ExportFolder.open(out) if finished else _made(args, out)
    faults = [*(folder.verify() if args.verify else []), *folder.over_disk]
    data: dict[str, Any] = {"path": str(out), "digest": folder.digest, "blocks": blocks_of(folder), "faults": faults}
    lines = [summary(folder), *faults]
    passed = not faults
    if args.trace:
        from bagel_compress.validation.export import validate_export

        report = validate_export(folder, args.trace)
        passed = passed and report.passed
        data["parity"] = report.model_dump(mode="json") | {"passed": report.passed}
        lines += parity_lines(report)
    emit(args, data, "\n".join(lines))
    return 0 if passed else 1


def _made(args: argparse.Namespace, out: Path) -> ExportFolder:
    from tqdm import tqdm

    from bagel_compress.exporting.build import export
    from bagel_compress.exporting.source import WeightSource
    from bagel_compress.run.target import Target

    with tqdm(unit="file", desc="export", leave=False, disable=args.json or None) as bar:

        def step(name: str, done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.set_postfix_str(name)

        return export(WeightSource.open(args.source), Target.load(args.target), out, step)


def follow_recipe(artifact: Artifact, trace: Path) -> tuple[dict[str, Any], str, bool]:
    """Exports an artifact for its recipe's target into a folder beside it, and compares the export with the trace.

    Returns the data for --json, the text, and whether everything passed. Without a GPU, engines are built, and their
    graphs are compared in their place.
    """
    from bagel_compress.exporting.build import export
    from bagel_compress.exporting.manifest import MANIFEST, ExportFolder
    from bagel_compress.exporting.source import ArtifactSource
    from bagel_compress.run.target import Target
    from bagel_compress.validation.export import validate_export

    target = Target.load(artifact.manifest.recipe.export or "")
    out = artifact.path.with_name(f"{artifact.path.name}-{target.name}")
    done = (out / MANIFEST).exists() and ExportFolder.open(out).manifest.source.digest == artifact.digest
    folder = ExportFolder.open(out) if done else export(ArtifactSource(artifact), target, out)
    data: dict[str, Any] = {"path": str(out), "digest": folder.digest, "blocks": blocks_of(folder)}
    report = validate_export(folder, [trace])
    data |= {"parity": report.model_dump(mode="json") | {"passed": report.passed}, "faults": folder.over_disk}
    lines = [summary(folder), *folder.over_disk, *parity_lines(report)]
    return data, "\n".join(lines), report.passed and not folder.over_disk


def parity_lines(report: ParityReport) -> list[str]:
    """The lines on an export's parity: the runtime, the verdict, and the faults."""
    env = report.environment
    what = f"{env['runtime']} {env['version']} on {env['provider']} in {env['precision']}"
    return [f"parity, {what}: {'passed' if report.passed else 'broken'}", *report.faults, *report.broken]


def inspect_export(args: argparse.Namespace) -> int:
    """The verb inspect for an export. Raises GateError, with --verify, if any file was changed."""
    from bagel_compress.errors import GateError
    from bagel_compress.exporting.manifest import ExportFolder

    folder = ExportFolder.open(args.path, check=not args.verify)
    faults = folder.verify() if args.verify else []
    manifest = folder.manifest
    data = {
        "kind": "export",
        "digest": folder.digest,
        "source": manifest.source.model_dump(mode="json", exclude={"recipe"}),
        "target": manifest.target,
        "settings": manifest.settings.model_dump(mode="json"),
        "opset": manifest.opset,
        "versions": manifest.versions,
        "profiles": {name: sizes.model_dump() for name, sizes in manifest.axes.items()},
        "bytes": folder.nbytes,
        "kinds": [dataclasses.asdict(kind) for kind in folder.kinds()],
        "blocks": blocks_of(folder),
        "verified": args.verify and not faults,
        "faults": faults,
    }
    emit(args, data, _inspected(folder, args.tensors, args.verify and not faults))
    if faults:
        raise GateError(f"{args.path} is damaged: {'; '.join(faults)}. Copy it again or export again.")
    return 0


def _inspected(folder: ExportFolder, blocks: bool, verified: bool) -> str:
    manifest, settings = folder.manifest, folder.manifest.settings
    row = "{:<13}{:>7} {:<22}{:>7}{:>16}{:>16}".format
    lines = [row("kind", "blocks", "matrices", "nodes", "reads, bytes", "engines, bytes")]
    for k in folder.kinds():
        engines = f"{k.engines:,}" if k.engines else "-"
        lines.append(row(k.kind, k.blocks, _forms(k.forms), k.nodes, f"{k.reads:,}", engines))
    lines.append(f"{folder.nbytes:,} bytes in {len(manifest.files)} files; a layer's two graphs read one file")
    if blocks:
        for b in blocks_of(folder):
            engine = f" engine {b['engine_bytes']:,}" if b["engine"] else ""
            lines.append(f"{b['block']} {_forms(b['forms'])} reads {b['weight_bytes']:,}{engine}")
    place = (
        f" on {settings.provider}"
        if settings.runtime == "onnxruntime"
        else f" for {', '.join(settings.capabilities) or 'this GPU'}"
    )
    lines.append(f"{settings.runtime}{place} in {settings.precision}, opset {manifest.opset}, target {manifest.target}")
    if settings.runtime != "onnxruntime":
        sizes = (f"{name} {s.min}..{s.opt}..{s.max}" for name, s in manifest.axes.items())
        lines.append("sizes (smallest, usual, largest): " + ", ".join(sizes))
    lines.append("made with " + ", ".join(f"{name} {version}" for name, version in manifest.versions.items()))
    source = manifest.source
    lines.append(f"export {folder.digest[:12]}: of {source.kind} {source.name} {source.digest[:12]}")
    if verified:
        lines.append(f"verified: {len(manifest.files)} files, every byte matches the manifest")
    return "\n".join(lines)


def _forms(forms: dict[str, int]) -> str:
    return ", ".join(f"{count} {form}" for form, count in forms.items()) or "-"


def blocks_of(folder: ExportFolder) -> list[dict[str, Any]]:
    """Plain data, one entry per block: kind, files, sizes, forms of its matrices."""
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
    """One line on the contents of an export, and for engines a reminder that they were not run."""
    manifest = folder.manifest
    stored = sum(entry.bytes for entry in manifest.files.values())
    text = (
        f"{folder.path}: {len(manifest.blocks)} blocks for {manifest.settings.runtime} in {manifest.settings.precision}"
        f", {stored:,} bytes; export {folder.digest[:12]}"
    )
    if manifest.settings.runtime != "onnxruntime":
        text += "\nengines were built; running them needs the GPU."
    return text
