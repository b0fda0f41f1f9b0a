"""Calibrated rounding beside a peer: one weight, the same second moments, the same scales, one run.

    python benchmarks/bench_calibrate.py [--rows 3584] [--columns 18944] [--block 1024] [--peer PYTHON] [--threads 2]

INT4 in blocks of 32, symmetric, scales absmax / 7.5: the one form that both sides have. `--peer` names a Python that
has llmcompressor (its own environment: it wants other versions than ours); its `quantize_weight` gets weight, moments
and scales in a file and rounds with static act-order, blocks of 128 and damping 0.01, as we do. Without one the peer is
the textbook form, written below in torch. Ours is timed whole, from moments to stored bytes checked by decoding.

Errors are tr(E H E^T) / tr(W H W^T) of the decoded weights, with all of H, for everyone, over 512 rows of the weight at
most. Also said: how fast ours works beside a plain product (counting the operations that the method needs, see
`operations`). Moments: inputs of a falling spectrum, mixed over all columns (so that moments in blocks lose more than
where neighbours are alike), columns of unlike sizes. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = 32  # weights per scale
NAME = "w.weight"
MEASURED = 512  # rows of the weight, evenly taken, whose errors are measured


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3584)
    parser.add_argument("--columns", type=int, default=18944)
    parser.add_argument("--inputs", type=int, default=16384, help="rows of inputs (default 16384)")
    parser.add_argument(
        "--block", type=int, default=1024, help="width of block-diagonal moments, timed beside whole ones"
    )
    parser.add_argument("--peer", type=Path, help="a Python that has llmcompressor")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--as-peer", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.as_peer:
        return round_as_peer(args.as_peer)
    weights = (torch.randn(args.rows, args.columns, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    found: dict[str, Any] = {"benchmark": "calibrate.rounding", "rows": args.rows, "columns": args.columns}
    found |= {"inputs": args.inputs, "threads": args.threads, "torch": torch.__version__}
    moments, seconds, h = whole_moments(args)
    found["moments"] = {"seconds": seconds, "gflops": 2e-9 * args.inputs * args.columns**2 / seconds}
    found["matmul_gflops"] = matmul_rate(args.rows, min(args.columns, 8192))
    signal = energy(weights.float(), h)
    decoded, ours = round_ours(weights, moments, args)
    for name, entry in ours.items():
        entry["error"] = energy(weights.float() - decoded[name].float(), h) / signal
    found["ours"] = ours
    peer, entry = round_by_peer(weights, h, args)
    found["peer"] = entry | {"error": energy(weights.float() - peer, h) / signal}
    print(json.dumps(found, default=float))
    return 0


def inputs(args: argparse.Namespace) -> Any:
    """Pieces of inputs (rows, columns): spectrum k^-1/2, mixed by rotations in two groupings, log-normal sizes."""
    columns = args.columns
    drawn = torch.Generator().manual_seed(1)
    spectrum = torch.arange(1, columns + 1) ** -0.5
    sizes = torch.exp(0.5 * torch.randn(columns, generator=drawn))
    width = next(w for w in (512, 256, 128, 64, 32) if columns % w == 0)
    turns = [torch.linalg.qr(torch.randn(width, width, generator=drawn))[0] for _ in range(2)]
    for start in range(0, args.inputs, 1024):
        x = torch.randn(min(1024, args.inputs - start), columns, generator=drawn) * spectrum
        for turn in turns:
            x = (x.unflatten(1, (width, -1)).transpose(1, 2) @ turn).flatten(1)
        yield x * sizes


def whole_moments(args: argparse.Namespace) -> tuple[dict[str, Any], float, Tensor]:
    """Moments whole and in blocks, seconds for the whole ones, and H."""
    from bagel_compress.calibrate.moments import Moments

    made = {"whole": Moments(args.columns), "blocks": Moments(args.columns, block=args.block)}
    seconds = 0.0
    for piece in inputs(args):
        start = time.perf_counter()
        made["whole"].add(piece)
        seconds += time.perf_counter() - start
        made["blocks"].add(piece)
    return made, seconds, made["whole"].blocks()[0].h


def matmul_rate(rows: int, columns: int) -> float:
    """GFLOP/s of a plain fp32 product (rows, columns) x (columns, columns)."""
    a, b = torch.randn(rows, columns), torch.randn(columns, columns)
    start = time.perf_counter()
    a @ b
    return 2e-9 * rows * columns**2 / (time.perf_counter() - start)


def operations(rows: int, columns: int, block: int) -> float:
    """Operations of the products: a factor of each block, feedback, the descent's gradients, two measured errors."""
    blocks = -(-columns // block)
    return blocks * block**2 * (block / 3 + 4 * rows)


def round_ours(weights: Tensor, moments: dict[str, Any], args: argparse.Namespace) -> tuple[dict[str, Tensor], Any]:
    """Decoded weights and figures by name."""
    from bagel_compress.calibrate.rounding import round_unit
    from bagel_compress.codecs.base import InMemory, Unit
    from bagel_compress.codecs.calibrated import Gptq
    from bagel_compress.codecs.grid import Packed
    from bagel_compress.codecs.int4 import Int4
    from bagel_compress.io.tensor_spec import TensorSpec

    unit, source = Unit(NAME, (TensorSpec("BF16", tuple(weights.shape), NAME),)), InMemory({NAME: weights})
    plain, found, decoded = Int4(), {}, {}
    start = time.perf_counter()
    decoded["nearest"] = plain.decode(unit, plain.encode(unit, {NAME: weights}))[NAME]
    found["nearest"] = {"seconds": time.perf_counter() - start}
    small = Unit(NAME, (TensorSpec("BF16", (64, args.columns), NAME),))
    round_unit(Int4(rounding="gptq"), small, InMemory({NAME: weights[:64]}), moments["blocks"])  # compiles the kernels
    cases = {
        "gptq + descent, moments in blocks": ("blocks", Int4(rounding="gptq")),
        "gptq": ("whole", Int4(rounding=Gptq(passes=0))),
        "gptq + descent": ("whole", Int4(rounding="gptq")),
        "gptq + descent, searched scales": ("whole", Int4(scale="mse", rounding="gptq")),
    }
    for name, (which, codec) in cases.items():
        moments[which].forget_factors()
        start = time.perf_counter()
        encoding = round_unit(codec, unit, source, moments[which])
        seconds = time.perf_counter() - start
        assert isinstance(encoding, Packed)
        assert isinstance(codec.rounding, Gptq)
        block = args.block if which == "blocks" else args.columns
        work = operations(*weights.shape, block)
        found[name] = {"seconds": seconds, "gflops": 1e-9 * work / seconds, "damping": encoding.rounded.damping}
        decoded[name] = codec.decode(unit, dict(encoding.stored))[NAME]
        print(f"{name}: {seconds:.1f} s", file=sys.stderr)
    return decoded, found


def energy(values: Tensor, h: Tensor) -> float:
    """tr(V H V^T) over some rows."""
    part = values[:: max(1, len(values) // MEASURED)]
    return float(((part @ h) * part).sum(1).double().sum())


def scales_of(weights: Tensor) -> Tensor:
    """absmax / 7.5 of each block, as bf16 holds it."""
    return (weights.float().unflatten(1, (-1, BLOCK)).abs().amax(2) / 7.5).bfloat16()


def round_by_peer(weights: Tensor, h: Tensor, args: argparse.Namespace) -> tuple[Tensor, dict[str, Any]]:
    """Decoded weights and figures of the peer, or of the textbook form without one."""
    scales = scales_of(weights)
    if args.peer is None:
        start = time.perf_counter()
        decoded = textbook(weights.float(), h, scales.float())
        return decoded, {"name": "textbook GPTQ in torch", "seconds": time.perf_counter() - start}
    with TemporaryDirectory() as folder:
        file = Path(folder) / "weight.safetensors"
        save_file({"weights": weights, "h": h, "scales": scales}, file)
        command = [str(args.peer), __file__, "--as-peer", str(file), "--threads", str(args.threads)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return load_file(Path(folder) / "rounded.safetensors")["decoded"].float(), json.loads(
            done.stdout.splitlines()[-1]
        )


def round_as_peer(file: Path) -> int:
    """Runs in the peer's Python: llmcompressor's GPTQ on what the file holds."""
    from importlib.metadata import version

    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    held = load_file(file)
    kind = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=BLOCK, actorder="static")
    scales = held["scales"].float()[None]
    start = time.perf_counter()
    decoded, _, fallback = quantize_weight(
        held["weights"].float()[None], held["h"][None], scales, torch.zeros_like(scales), None, kind
    )
    seconds = time.perf_counter() - start
    save_file({"decoded": decoded[0].bfloat16().contiguous()}, file.parent / "rounded.safetensors")
    name = f"llmcompressor {version('llmcompressor')}"
    print(json.dumps({"name": name, "seconds": seconds, "fell_back": bool(fallback.any())}))
    return 0


def textbook(weights: Tensor, h: Tensor, scales: Tensor, damping: float = 0.01, step: int = 128) -> Tensor:
    """GPTQ as its paper has it: inverse, its upper factor, columns in blocks of 128, static act-order."""
    order = h.diagonal().argsort(descending=True)
    left, damped = weights[:, order].clone(), h[order][:, order].clone()
    damped.diagonal().add_(damping * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    out, scale = torch.empty_like(left), scales[:, order // BLOCK]
    for a in range(0, left.shape[1], step):
        b = min(a + step, left.shape[1])
        errors = torch.empty(len(left), b - a)
        for j in range(a, b):
            out[:, j] = (left[:, j] / scale[:, j]).round().clamp(-8, 7) * scale[:, j]
            errors[:, j - a] = (left[:, j] - out[:, j]) / upper[j, j]
            left[:, j:b] -= errors[:, j - a, None] * upper[j, j:b]
        left[:, b:] -= errors @ upper[a:b, b:]
    return out[:, order.argsort()]


if __name__ == "__main__":
    sys.exit(main())
