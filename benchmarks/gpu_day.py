"""One visit to a machine with a CUDA GPU, in parts that are complete by themselves; each writes a receipt.

    python benchmarks/gpu_day.py [PART ...] [--out exports/receipts/gpu-day] [--work DIR] [--recipes nf4] [--dry-run]

Parts, in this order if none is named:
    suite      tests/gpu
    kernels    every decoder on the GPU (CUDA kernel, Triton, torch) against the CPU's, bit for bit
    decoders   GB of bf16 that the entropy decoders give in a second, beside a device copy and the dfloat11 package
    draw       synthetic 7B builds at 1024 x 1024: peak beside its prediction, seconds, a step beside its floor

Receipts are PART.json: the GPU, the versions, seconds, what was found, and whether the part passed. A part that failed
does not keep the others from running; then the exit code is 1. `draw` makes a checkpoint of 29 GB and one build after
the other in --work, and takes the longest: a few recipes at a time fit a short visit.

--dry-run runs everything but CUDA on any machine: Triton in its interpreter, the small shape in place of the released
one, and what needs a GPU skipped by name. It proves that a visit will not be spent on a typing error.

A bare machine without an index: carry the wheels that `pip download --only-binary :all: -d wheels -e .` gives, and
install them there with `pip install --no-index --find-links wheels -e .`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from bench_df11 import mixed
from bench_df11_gpu import kernels as df11_kernels
from bench_df11_gpu import rate

from bagel_compress.budgets.fake_model import BuildOutline
from bagel_compress.budgets.measure_gpu import measured
from bagel_compress.budgets.pass_profile import profile_pass
from bagel_compress.budgets.predict import predict
from bagel_compress.build.artifact import Artifact
from bagel_compress.build.compress import compress
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.codecs import DF11
from bagel_compress.codecs.base import Codec, Unit
from bagel_compress.codecs.ecq import Ecq
from bagel_compress.codecs.ecq.device import StoredWeight
from bagel_compress.codecs.fp8 import Fp8
from bagel_compress.codecs.int4 import Int4
from bagel_compress.codecs.int8 import Int8
from bagel_compress.codecs.nf4 import Nf4
from bagel_compress.io.atomic import write_atomic
from bagel_compress.io.packaged import find_recipe
from bagel_compress.io.tensor_spec import TensorSpec
from bagel_compress.run.load import load
from bagel_compress.run.target import Device, Target, Workload
from bagel_compress.source.checkpoint import Checkpoint
from bagel_compress.source.synthetic import synthesise

DRY = "--dry-run" in sys.argv
ROOT = Path(__file__).resolve().parents[1]
NAME = "bench.weight"
RECIPES = ("bf16-32gb", "fp8-24gb", "int8-24gb", "nf4-nearest", "df11")  # those that need no calibration set
SHAPES = (
    [(4, 64)] if DRY else [(3584, 3584), (37, 448), (1, 64)]
)  # of the released model, of no whole tile, of one block


@dataclass(slots=True)
class Found:
    """What a part found: figures, what it skipped and why, and what failed."""

    figures: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def main() -> int:
    args = arguments()
    if not DRY and not torch.cuda.is_available():
        print("gpu_day: no CUDA device here; run it on a machine with one, or with --dry-run.", file=sys.stderr)
        return 2
    if DRY and "TRITON_INTERPRET" not in os.environ:  # read when Triton is imported, which it is by now
        return subprocess.call([sys.executable, *sys.argv], env=os.environ | {"TRITON_INTERPRET": "1"})
    failed = 0
    for name in args.parts or PARTS:
        start, found = time.perf_counter(), Found()
        try:
            PARTS[name](args, found)
        except Exception as error:  # a part's fault is its result; the machine is only lent, so the others go on
            found.failed.append(f"{type(error).__name__}: {error}")
        write_receipt(args.out, name, found, time.perf_counter() - start)
        failed += bool(found.failed)
    return 1 if failed else 0


def write_receipt(out: Path, part: str, found: Found, seconds: float) -> None:
    receipt = {
        "part": part,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "dry_run": DRY,
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
        "seconds": round(seconds, 1),
        "passed": not found.failed,
        "figures": found.figures,
        "skipped": found.skipped,
        "failed": found.failed,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / f"{part}.json", json.dumps(receipt, indent=1) + "\n")
    print(json.dumps(receipt), flush=True)


# --- parts ------------------------------------------------------------------------------------------------------------


def suite(args: argparse.Namespace, found: Found) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests" / "gpu")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found.figures["pytest"] = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-300:]
    if done.returncode:
        found.failed.append(f"pytest ended with {done.returncode}")


def kernels(args: argparse.Namespace, found: Found) -> None:
    """Every codec's decoder on the device against the CPU's."""
    codecs: list[Codec] = [Nf4(double_quant=True), Int8(), Int4(), Fp8(), DF11(), Ecq(bits=4.13), Ecq(bits=7.5)]
    compared = 0
    for codec in codecs:
        for rows, columns in SHAPES:
            unit, parts, expected = coded(codec, rows, columns)
            for way, decode in ways(codec, unit, found).items():
                label = f"{codec.format} {rows} x {columns}, {way}"
                out = decode({name: on_device(part) for name, part in parts.items()}).cpu()
                compared += 1
                if not torch.equal(out.view(torch.int16).flatten(), expected.view(torch.int16).flatten()):
                    found.failed.append(f"{label} differs from the CPU's weights")
    found.figures["decoders compared"] = compared


def ways(codec: Codec, unit: Unit, found: Found) -> dict[str, Callable[[dict[str, torch.Tensor]], torch.Tensor]]:
    """The ways in which a format is decoded on this device: parts -> bf16 weights."""
    own = {} if DRY else {"own": lambda parts: codec.decode(unit, parts)[NAME]}
    if DRY:
        found.skipped.append(f"{codec.format}'s decoder on CUDA")
    try:
        import triton  # noqa: F401
    except ImportError:
        found.skipped.append(f"{codec.format} in Triton: not installed")
        return own
    if codec.format == "ecq":
        from bagel_compress.codecs.ecq import triton_kernel as ecq_triton
        from bagel_compress.codecs.ecq.decode import check_parts

        def by_triton(parts: dict[str, torch.Tensor]) -> torch.Tensor:
            stored = check_parts(unit, parts)
            out = torch.zeros(unit.numel, dtype=torch.bfloat16, device=stored.stream.device)
            ecq_triton.runs(stored)(0, stored.runs, out)
            return out

        return {**own, "Triton": by_triton}
    if codec.format == "df11":
        return {**own, "Triton": lambda parts: df11_by_triton(unit, parts)}
    return own


def df11_by_triton(unit: Unit, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    from bagel_compress.codecs.df11 import triton_kernel, unpack

    luts = parts[f"{unit.name}.luts"]
    table = torch.from_numpy(unpack.lookup_table(luts.cpu().numpy()).view(np.int64)).to(luts.device)
    positions = parts[f"{unit.name}.output_positions"].cpu().numpy().view("<u4").astype(np.int64)
    out = torch.zeros(unit.numel, dtype=torch.bfloat16, device=luts.device)
    stream, rest, gaps = (parts[f"{unit.name}.{key}"] for key in ("encoded_exponent", "sign_mantissa", "gaps"))
    triton_kernel.decode(table, luts, stream, rest, torch.from_numpy(positions).to(luts.device), gaps, out)
    return out


def decoders(args: argparse.Namespace, found: Found) -> None:
    """GB of bf16 a second on an MLP unit of the released model; the copy's are GB copied."""
    if DRY:
        found.skipped.append("speed of decoders on CUDA")
        return
    weights = mixed(18944, 3 * 3584)
    df11 = Unit("bench", (TensorSpec("BF16", tuple(weights.shape), NAME),))
    out = torch.empty(weights.numel(), dtype=torch.bfloat16, device="cuda")
    parts = {name: part.cuda() for name, part in DF11().encode(df11, {NAME: weights}).items()}
    original = weights.cuda().flatten()
    measure: dict[str, Callable[[], Any]] = {"device copy": lambda: out.copy_(original)}
    measure |= {f"df11, {name}": work for name, work in df11_kernels(df11, parts, out).items()}
    for bits in (3.0, 4.13, 6.0):
        unit, stored, _ = coded(Ecq(bits=bits), 18944, 3584)
        [whole] = StoredWeight(unit, {n: p.cuda() for n, p in stored.items()}).slices(unit.numel)
        space = torch.empty(unit.numel, dtype=torch.bfloat16, device="cuda")
        found.figures[f"ecq, {bits} bits"] = round(rate(lambda w=whole, o=space: w.decode_into(o), space, 20), 1)  # type: ignore[misc]
    found.figures |= {name: round(rate(work, out, 20), 1) for name, work in measure.items()}


def draw(args: argparse.Namespace, found: Found) -> None:
    """Each recipe's build of the synthetic checkpoint: measured peak and times beside the prediction and the floor."""
    with TemporaryDirectory(dir=args.work) as made:
        source = Path(made) / "source"
        synthesise("tiny" if DRY else "7b-mot", source, seed=0)
        checkpoint = Checkpoint.open(source)
        for recipe in args.recipes:
            with TemporaryDirectory(dir=args.work) as folder:
                plan = make_plan(checkpoint, Recipe.load(find_recipe(recipe)))
                artifact = compress(plan, checkpoint, Path(folder) / "build")
                found.figures[recipe] = drawn(artifact, checkpoint, found)


def drawn(artifact: Artifact, checkpoint: Checkpoint, found: Found) -> dict[str, Any]:
    side = 64 if DRY else 1024
    sizes = Workload(image=(side, side), input_image=(side, side), think_tokens=16, answer_tokens=16)
    outline = BuildOutline.of_artifact(artifact)
    if DRY:
        target = Target(name="dry", device=Device(name="none", memory_mib=1024), sizes=sizes, tasks=("t2i", "edit"))
        report = predict(outline, target)
        found.skipped.append(f"{artifact.manifest.recipe.name}: peaks and times on CUDA")
    else:
        total = torch.cuda.get_device_properties(0).total_memory >> 20
        device = Device(name=torch.cuda.get_device_name(), memory_mib=total)
        target = Target(name="gpu-day", device=device, sizes=sizes, tasks=("t2i", "edit"))
        report = measured(artifact, predict(outline, target), target, "cuda")
    profile = profile_pass(load(artifact, "cpu" if DRY else "cuda"), "step", (side, side), repeats=1 if DRY else 3)
    peaks = {p.name: {"predicted": p.total, "measured": p.measured} for p in report.phases}
    return {
        "bytes": artifact.nbytes,
        "peaks": peaks,
        "seconds": {t.what: round(t.median, 5) for t in report.timings},
        "pass": {"seconds": profile.seconds, "floor": profile.floor, "ratio": round(profile.ratio, 3)},
    }


PARTS: dict[str, Callable[[argparse.Namespace, Found], None]] = {
    "suite": suite,
    "kernels": kernels,
    "decoders": decoders,
    "draw": draw,
}


# --- small things -----------------------------------------------------------------------------------------------------


def coded(codec: Codec, rows: int, columns: int) -> tuple[Unit, dict[str, torch.Tensor], torch.Tensor]:
    """A weight's unit, its stored parts, and what the CPU decodes them to."""
    weights = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.02).bfloat16()
    unit = Unit("bench" if codec.format == "df11" else NAME, (TensorSpec("BF16", (rows, columns), NAME),))
    parts = dict(codec.encode(unit, {NAME: weights}))
    return unit, parts, codec.decode(unit, parts)[NAME]


def on_device(part: torch.Tensor) -> torch.Tensor:
    return part if DRY else part.cuda()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="what to run (default: all)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "exports" / "receipts" / "gpu-day", help="folder of receipts"
    )
    parser.add_argument("--work", type=Path, help="folder for checkpoint and builds, 60 GB (default: the system's)")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), help="recipes of `draw` (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="everything but CUDA, on any machine")
    args = parser.parse_args()
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"there is no part {unknown[0]}; parts are {', '.join(PARTS)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
