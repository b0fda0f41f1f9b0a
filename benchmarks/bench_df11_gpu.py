"""DF11 decoding on a GPU: our CUDA and Triton kernels, the `dfloat11` package's kernel, and a device copy. One process.

    python benchmarks/bench_df11_gpu.py [--rows 18944] [--columns 10752] [--repeats 20]

Figures are GB of bf16 output per second (powers of ten), median of CUDA event times; the copy's are GB of bf16 copied.
Every output is compared with the source bit for bit. Without CUDA it says so and measures nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from bench_df11 import mixed

from bagel_compress.codecs import DF11
from bagel_compress.codecs.base import Unit
from bagel_compress.codecs.df11 import triton_kernel, unpack
from bagel_compress.codecs.df11.device import Df11Unit
from bagel_compress.io.tensor_spec import TensorSpec

NAME = "bench"


def main() -> None:
    args = _arguments()
    if not torch.cuda.is_available():
        print(json.dumps({"bench": "df11-gpu", "skipped": "no CUDA device"}))
        return
    weights = mixed(args.rows, args.columns)
    unit = Unit(NAME, (TensorSpec("BF16", tuple(weights.shape), f"{NAME}.weight"),))
    parts = {name: part.cuda() for name, part in DF11().encode(unit, {f"{NAME}.weight": weights}).items()}
    out, expected = torch.empty(weights.numel(), dtype=torch.bfloat16, device="cuda"), weights.cuda().flatten()
    rates = {"device copy": rate(lambda: out.copy_(expected), out, args.repeats)}
    for name, work in kernels(unit, parts, out).items():
        out.zero_()
        rates[name] = rate(work, out, args.repeats)
        if not torch.equal(out.view(torch.int16), expected.view(torch.int16)):
            raise SystemExit(f"{name} did not give the weights back")
    device = torch.cuda.get_device_name()
    print(f"{args.rows} x {args.columns} bf16, {device}")
    for name, value in rates.items():
        print(f"{name:16s} {value:8.1f} GB/s")
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    figures = {name: round(value, 1) for name, value in rates.items()}
    print(json.dumps({"bench": "df11-gpu", "gpu": device, "gb_per_s": figures, "versions": versions}))


def kernels(unit: Unit, parts: dict[str, torch.Tensor], out: torch.Tensor) -> dict[str, Callable[[], Any]]:
    stored = Df11Unit(unit, parts)
    found: dict[str, Callable[[], Any]] = {"ours": lambda: stored.decode_into(out)}
    arrays = [parts[f"{NAME}.{s}"] for s in ("luts", "encoded_exponent", "sign_mantissa", "output_positions", "gaps")]
    positions = arrays[3].cpu().numpy().view("<u4").astype(np.int64)
    table = torch.from_numpy(unpack.lookup_table(arrays[0].cpu().numpy()).view(np.int64)).cuda()
    wide = torch.from_numpy(positions).cuda()
    found["ours, Triton"] = lambda: triton_kernel.decode(table, *arrays[:3], wide, arrays[4], out)
    package = importlib.util.find_spec("dfloat11")
    if package is not None and package.origin is not None:
        from torch.cuda._utils import _cuda_load_module

        ptx = (Path(package.origin).parent / "decode.ptx").read_bytes()
        official = _cuda_load_module(ptx, ["decode"])["decode"]
        shared = 4 * 512 + 4 + 2 * int(np.diff(positions).max())
        sizes = [arrays[0].shape[0], arrays[1].numel(), out.numel()]
        grid = (len(positions) - 1, 1, 1)
        found["dfloat11"] = lambda: official(grid, (512, 1, 1), [*arrays, out, *sizes], shared)
    return found


def rate(work: Callable[[], Any], out: torch.Tensor, repeats: int) -> float:
    """GB of bf16 output per second."""
    work()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e-3)
    return out.numel() * 2 / median(times) / 1e9


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=18944)
    parser.add_argument("--columns", type=int, default=10752)
    parser.add_argument("--repeats", type=int, default=20)
    return parser.parse_args()


if __name__ == "__main__":
    main()
