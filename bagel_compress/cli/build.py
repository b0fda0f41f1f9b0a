"""The verbs plan, compress, inspect and synth: from a checkpoint to an artifact."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bagel_compress.cli import add_json, add_verb, emit

if TYPE_CHECKING:
    from bagel_compress.build.artifact import Artifact
    from bagel_compress.build.plan import Plan
    from bagel_compress.calibrate.calibration_set import CalibrationSet
    from bagel_compress.source.checkpoint import Checkpoint

_SOURCE = "checkpoint folder, .safetensors file or Hub id (owner/name[@revision])"


def register(verbs: Any) -> None:
    """Adds this group's parsers to `verbs` (an argparse sub-parsers action)."""
    plan = add_verb(
        verbs, "plan", "decide codec and shard of every tensor; reads no weights",
        "bagel-compress plan nf4-12gb\n  bagel-compress plan recipes/nf4.yaml --source BAGEL-7B-MoT --json",
    )  # fmt: skip
    _recipe(plan, "the packaged header of the released checkpoint is used, without a download")
    add_calibration(plan)
    add_json(plan)
    plan.set_defaults(verb=_plan)

    compress = add_verb(
        verbs, "compress", "build an artifact; run it again to continue after an interruption",
        "bagel-compress compress recipes/nf4.yaml --source BAGEL-7B-MoT --out out/nf4\n"
        "  bagel-compress compress fp8-24gb --source my-finetune --base BAGEL-7B-MoT --lora my-lora --out out/mine",
    )  # fmt: skip
    _recipe(compress, "the recipe's own source is used")
    add_calibration(compress)
    compress.add_argument("--device", default="cpu", help="where a calibrated build runs the layers: cpu, cuda, cuda:1")
    compress.add_argument(
        "--out", required=True, metavar="DIR", help="folder of the artifact: new, or an unfinished build of this plan"
    )
    add_json(compress)
    compress.set_defaults(verb=_compress)

    inspect = add_verb(
        verbs, "inspect", "sizes of a checkpoint, artifact or export, part by part",
        "bagel-compress inspect out/nf4 --verify\n  bagel-compress inspect out/int8-onnx --verify\n"
        "  bagel-compress inspect BAGEL-7B-MoT",
    )  # fmt: skip
    inspect.add_argument("path", metavar="PATH", help="artifact folder, export folder or checkpoint")
    inspect.add_argument("--verify", action="store_true", help="read every byte; exit 1 if anything was changed")
    inspect.add_argument(
        "--loaders", action="store_true", help="list which other loaders open the artifact, and how that was checked"
    )
    inspect.add_argument("--tensors", action="store_true", help="one line per unit, or per block of an export, too")
    add_json(inspect)
    inspect.set_defaults(verb=_inspect)

    synth = add_verb(
        verbs, "synth", "write a synthetic checkpoint of the true shape",
        "bagel-compress synth 7b-mot --layers 2 --out out/synth2\n  bagel-compress synth tiny --out out/tiny --seed 1",
    )  # fmt: skip
    synth.add_argument("shape", choices=("7b-mot", "medium", "tiny"))
    synth.add_argument("--layers", type=int, metavar="N", help="decoder layers (default: all)")
    synth.add_argument("--out", required=True, metavar="DIR", help="new or empty folder")
    synth.add_argument("--seed", type=int, default=0)
    synth.set_defaults(verb=_synth)


def _recipe(parser: argparse.ArgumentParser, without: str) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="recipe file, or the name of one that comes with the package")
    parser.add_argument("--source", metavar="SRC", help=f"{_SOURCE}; if omitted, {without}")
    add_base_and_lora(parser)


def add_base_and_lora(parser: argparse.ArgumentParser) -> None:
    """Adds the options --base and --lora, which complete or change the checkpoint of --source."""
    parser.add_argument(
        "--base", metavar="SRC", help="checkpoint that supplies configs, tokenizer, VAE and tensors a fine-tune lacks"
    )
    parser.add_argument("--lora", metavar="DIR", help="peft adapter folder to merge while reading")


def open_calibration(path: str | None) -> CalibrationSet | None:
    """Opens the calibration set of the option --calibration; None without it. Raises CalibrationError."""
    if path is None:
        return None
    from bagel_compress.calibrate.calibration_set import CalibrationSet

    return CalibrationSet.open(path)


def add_calibration(parser: argparse._ActionsContainer) -> None:
    """Adds the option --calibration."""
    parser.add_argument(
        "--calibration", metavar="FILE",
        help="calibration set of a recipe with calibrated rounding, from `calibrate` (BAGEL-nano's is packaged)",
    )  # fmt: skip


def _plan(args: argparse.Namespace) -> int:
    from bagel_compress.build.plan import make_plan
    from bagel_compress.build.recipe import Recipe
    from bagel_compress.io.packaged import find_recipe
    from bagel_compress.source.released_header import TrueHeader

    recipe = Recipe.load(find_recipe(args.recipe))
    header = TrueHeader() if args.source is None else open_checkpoint(args)
    plan = make_plan(header, recipe, open_calibration(args.calibration))
    emit(args, plan.to_json(), plan.table())
    return 0


def _compress(args: argparse.Namespace) -> int:
    from bagel_compress.budgets.device_option import one_device
    from bagel_compress.build.compress import compress
    from bagel_compress.build.plan import make_plan
    from bagel_compress.build.recipe import Recipe
    from bagel_compress.io.byte_size import size_text
    from bagel_compress.io.packaged import find_recipe

    recipe = Recipe.load(find_recipe(args.recipe))
    if args.source is None and recipe.source is not None:
        revision = f"@{recipe.source.revision}" if recipe.source.revision else ""
        args.source = recipe.source.repo + revision
    if args.source is not None and not Path(args.source).exists():
        print(
            f"{args.source}: files that are not in the Hub's cache are downloaded first (the released model: 29.5 GB)",
            file=sys.stderr,
        )
    checkpoint, start = open_checkpoint(args), time.monotonic()
    plan = make_plan(checkpoint, recipe, open_calibration(args.calibration))
    read = sum(spec.nbytes for p in plan.placements for spec in p.unit.specs)
    bound = "" if plan.exact else "at most "
    print(f"reads {size_text(read)} of weights, writes {bound}{size_text(plan.nbytes)} to {args.out}", file=sys.stderr)
    with progress_bar(plan) as step:
        artifact = compress(plan, checkpoint, args.out, step, one_device(args.device))
    stored = sum(entry.bytes for name, entry in artifact.manifest.files.items() if name in plan.shards)
    seconds, path = time.monotonic() - start, str(artifact.path)
    text = f"{path}: {stored:,} bytes in {len(plan.shards)} shards, {seconds:.0f} s; artifact {artifact.digest[:12]}"
    text += f"\nnext: bagel-compress validate {path} --trace FILE (made once by `bagel-compress trace`), or generate"
    data = {"path": path, "digest": artifact.digest, "plan": plan.digest, "bytes": stored}
    emit(args, data | {"seconds": seconds}, text)
    return 0


def open_checkpoint(args: argparse.Namespace) -> Checkpoint:
    """Opens the checkpoint of the options --source, --base and --lora. Raises CheckpointError."""
    from bagel_compress.errors import CheckpointError
    from bagel_compress.source.checkpoint import Checkpoint

    if args.source is None:
        raise CheckpointError(f"no source: the recipe names none; give --source ({_SOURCE}).")
    return Checkpoint.open(args.source, args.base, args.lora)


@contextmanager
def progress_bar(plan: Plan) -> Iterator[Callable[[str, int], None]]:
    """A progress bar on stderr over the source bytes of a plan. Yields the callback for `compress`."""
    from tqdm import tqdm

    total = sum(spec.nbytes for p in plan.placements for spec in p.unit.specs)
    with tqdm(total=total, unit="B", unit_scale=True, file=sys.stderr, desc=plan.recipe.name, mininterval=0.5) as bar:

        def step(unit: str, nbytes: int) -> None:
            bar.update(nbytes)

        yield step


def _inspect(args: argparse.Namespace) -> int:
    from bagel_compress.build.manifest import MANIFEST
    from bagel_compress.cli.export import inspect_export
    from bagel_compress.exporting.manifest import MANIFEST as EXPORT
    from bagel_compress.exporting.manifest import UNFINISHED

    folder = Path(args.path)
    if (folder / MANIFEST).exists() or (folder / ".build").exists():
        return _inspect_artifact(args)
    if (folder / EXPORT).exists() or (folder / UNFINISHED).exists():
        return inspect_export(args)
    from bagel_compress.build.sizes import group_sizes, sizes_table
    from bagel_compress.codecs.raw import Raw
    from bagel_compress.source.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(args.path)
    groups = group_sizes((Raw(), (spec,), spec.nbytes) for spec in checkpoint.specs)
    nbytes = sum(spec.nbytes for spec in checkpoint.specs)
    digest = checkpoint.digest if args.verify else None  # reads all of it
    data = {"kind": "checkpoint", "fingerprint": checkpoint.fingerprint, "digest": digest, "bytes": nbytes}
    known = f"checkpoint {digest[:12]}" if digest else f"fingerprint {checkpoint.fingerprint[:12]} (all: --verify)"
    text = f"{sizes_table(groups, nbytes)}\n{known}, read as bf16"
    emit(args, data | {"groups": [g.to_json() for g in groups]}, text)
    return 0


def _inspect_artifact(args: argparse.Namespace) -> int:
    from bagel_compress.build.artifact import Artifact
    from bagel_compress.errors import GateError

    artifact = Artifact.open(args.path, check=not args.verify)
    faults = artifact.verify() if args.verify else []
    if args.loaders:
        return _loaders(args, artifact)
    manifest, snr = artifact.manifest, artifact.snr()
    data = {
        "kind": "artifact",
        "digest": artifact.digest,
        "plan": manifest.plan,
        "recipe": manifest.recipe.name,
        "source": manifest.source.model_dump(),
        "bytes": artifact.nbytes,
        "groups": [group.to_json() for group in artifact.groups()],
        "snr_db": {name: list(pair) for name, pair in snr.items()},
        "weighted_errors": [asdict(errors) for errors in artifact.weighted_errors()],
        "verified": args.verify and not faults,
        "faults": faults,
    }
    emit(args, data, _artifact_text(artifact, args.tensors, args.verify and not faults))
    if faults:
        raise GateError(f"{args.path} is damaged: {'; '.join(faults)}. Copy it again or rebuild it.")
    return 0


def _loaders(args: argparse.Namespace, artifact: Artifact) -> int:
    from bagel_compress.build.loader_table import HEAD, loader_rows

    rows = loader_rows(artifact)
    lines = [
        "\n  ".join((row[0], *(f"{head}: {cell}" for head, cell in zip(HEAD[1:], row[1:], strict=True))))
        for row in rows
    ]
    emit(args, {"loaders": [dict(zip(HEAD, row, strict=True)) for row in rows]}, "\n".join(lines))
    return 0


def _artifact_text(artifact: Artifact, tensors: bool, verified: bool) -> str:
    from bagel_compress.build.sizes import sizes_table

    manifest = artifact.manifest
    lines = [sizes_table(artifact.groups(), artifact.nbytes)]
    lines += [f"SNR {name}: {low:.2f} to {high:.2f} dB" for name, (low, high) in artifact.snr().items()]
    lines += [
        f"error of layer outputs {w.group}: {w.error:.4f} (at worst {w.worst:.4f}), rounded alone {w.nearest:.4f};"
        f" ratio {w.error / w.nearest:.2f}, predicted {w.predictor:.2f}"
        for w in artifact.weighted_errors()
    ]
    for name, unit in manifest.units.items():
        if unit.reason:
            lines.append(f"{name} is in {unit.codec.format}: {unit.reason}")
        if tensors:
            lines.append(f"{name} {unit.codec.format} {'lossless' if unit.snr_db is None else f'{unit.snr_db:.2f} dB'}")
    made = f"recipe {manifest.recipe.name}, source {manifest.source.digest[:12]}, {manifest.tool}"
    lines.append(f"artifact {artifact.digest[:12]}: {made}")
    if verified:
        lines.append(f"verified: {len(manifest.files) + 1} files, every byte matches the manifest")
    return "\n".join(lines)


def _synth(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from bagel_compress.source.synthetic import synthesise

    with tqdm(unit="B", unit_scale=True, file=sys.stderr, desc="synth", mininterval=0.5) as bar:
        nbytes = synthesise(args.shape, Path(args.out), args.seed, args.layers, bar.update)
    print(f"{args.out}: {nbytes:,} bytes of weights, seed {args.seed}")
    return 0
