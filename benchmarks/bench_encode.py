"""Encoding speed of the lossy codecs beside bitsandbytes, compressed-tensors, comfy-kitchen and torch.

The same tensor, process and threads for all.

    python benchmarks/bench_encode.py [--rows 4096] [--columns 3584] [--repeats 5] [--threads 1 2] [--clock wall]

Ours is the streaming encoder as a build runs it: chunks read, coded, decoded again from the bytes made, error measured.
The peers only encode. Before anything is timed, our bytes are compared with bitsandbytes'. Rates are bf16 input bytes
per second (GB = 10^9), the median of the repeats, each row's repeats in one go after a warm-up. `--clock cpu` counts
the processor time of the calling thread instead, for a busy machine; it is meaningful for one thread only.
Ends in one JSON line. Normal weights of deviation 0.02, seed 0.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bagel_compress.codecs.base import Codec, InMemory, Unit
from bagel_compress.codecs.fp8 import Fp8
from bagel_compress.codecs.int4 import Int4
from bagel_compress.codecs.int8 import Int8
from bagel_compress.codecs.mxfp import Mxfp4, Mxfp8
from bagel_compress.codecs.nf4 import Nf4
from bagel_compress.codecs.nvfp4 import Nvfp4
from bagel_compress.io.tensor_spec import TensorSpec

NAME = "w.weight"
OURS: dict[str, Codec] = {
    "nf4": Nf4(),
    "nf4 double_quant": Nf4(double_quant=True),
    "nf4 mse": Nf4(scale="mse"),
    "int8": Int8(),
    "int8 mse": Int8(scale="mse"),
    "fp8": Fp8(),
    "fp8 tensor": Fp8(granularity="tensor"),
    "fp8 mse": Fp8(scale="mse"),
    "int4 (W4A16)": Int4(),
    "int4 asymmetric": Int4(symmetric=False),
    "nvfp4": Nvfp4(),
    "nvfp4 mse": Nvfp4(scale="mse"),
    "mxfp8": Mxfp8(),
    "mxfp4": Mxfp4(),
}
RATIOS = {
    "nf4": "bitsandbytes quantize_4bit",
    "nf4 double_quant": "bitsandbytes quantize_4bit nested",
    "int8": "bitsandbytes int8_vectorwise_quant",
    "fp8": "torch fp8 by row",
    "int4 (W4A16)": "compressed-tensors int4 (W4A16)",
    "int4 asymmetric": "compressed-tensors int4 asymmetric",
    "nvfp4": "comfy-kitchen quantize_nvfp4, eager",
    "mxfp8": "comfy-kitchen quantize_mxfp8, eager",
    "mxfp4": "compressed-tensors mxfp4",
}
PACKAGES = ("bagel-compress", "torch", "numba", "bitsandbytes", "compressed-tensors", "comfy-kitchen")
COMPRESSED_TENSORS = ("int4 (W4A16)", "int4 asymmetric", "nvfp4", "mxfp8", "mxfp4")


def main() -> int:
    args = _arguments()
    warnings.filterwarnings("ignore")
    weights = (torch.randn(args.rows, args.columns, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    identical = compare(weights)
    work = ours(weights) | peers(weights)
    clock = time.thread_time if args.clock == "cpu" else time.perf_counter
    rates: dict[str, dict[str, float]] = {}
    for threads in args.threads:
        torch.set_num_threads(threads)
        rates[str(threads)] = {name: weights.nbytes / seconds(f, args.repeats, clock) for name, f in work.items()}
    report(args, rates, identical)
    return 0 if identical else 1


def compare(weights: torch.Tensor) -> bool:
    """Are our NF4 and INT8 bytes bitsandbytes'? On one thread, on which its nested offset is ours."""
    import bitsandbytes

    torch.set_num_threads(1)
    packed, state = bitsandbytes.functional.quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
    codes, scb, _ = bitsandbytes.functional.int8_vectorwise_quant(weights.half())
    unit, tensors = _unit(weights), {NAME: weights}
    nf4, int8 = Nf4(double_quant=True).encode(unit, tensors), Int8().encode(unit, tensors)
    pairs = [(nf4[NAME], packed), (int8[NAME], codes), (int8["w.SCB"], scb)]
    pairs += [(nf4[f"{NAME}.{key}"], part) for key, part in state.as_dict(packed=True).items() if "state" not in key]
    return all(torch.equal(a, b) for a, b in pairs)


def ours(weights: torch.Tensor) -> dict[str, Callable[[], Any]]:
    unit, source = _unit(weights), InMemory({NAME: weights})

    def run(codec: Codec) -> None:
        for _ in codec.begin(unit, source).chunks():
            pass

    return {name: lambda codec=codec: run(codec) for name, codec in OURS.items()}  # type: ignore[misc]


def peers(weights: torch.Tensor) -> dict[str, Callable[[], Any]]:
    from bitsandbytes import functional
    from comfy_kitchen.backends import eager

    def by_row() -> torch.Tensor:
        values = weights.float()
        return (values / (values.abs().amax(1, keepdim=True) / 448)).clamp(-448, 448).to(torch.float8_e4m3fn)

    copy = torch.empty_like(weights)
    return {
        "bitsandbytes quantize_4bit": lambda: functional.quantize_4bit(weights, quant_type="nf4"),
        "bitsandbytes quantize_4bit nested": lambda: functional.quantize_4bit(
            weights, quant_type="nf4", compress_statistics=True
        ),
        "bitsandbytes int8_vectorwise_quant": lambda: functional.int8_vectorwise_quant(weights.half()),
        "torch fp8 by row": by_row,
        "comfy-kitchen quantize_nvfp4, eager": lambda: eager.quantize_nvfp4(weights, weights.abs().amax() / 2688),
        "comfy-kitchen quantize_mxfp8, eager": lambda: eager.quantize_mxfp8(weights),
        **{f"compressed-tensors {name}": compressed_tensors(weights, OURS[name]) for name in COMPRESSED_TENSORS},
        "torch fp8 cast, no scale": lambda: weights.to(torch.float8_e4m3fn),
        "torch copy": lambda: copy.copy_(weights),
    }


def compressed_tensors(weights: torch.Tensor, codec: Codec) -> Callable[[], Any]:
    """Its scales by absmax and its compressor, told the format by the codec's own entry of config.json."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    config = QuantizationConfig.model_validate(codec.config([_unit(weights)], [])["quantization_config"])
    compressor, scheme = BaseCompressor.get_value_from_registry(config.format), config.config_groups["group_0"]

    def run() -> Any:
        blocks = weights.unflatten(1, (-1, scheme.weights.group_size))
        low, high = blocks.amin(2), blocks.amax(2)
        whole = {}
        if scheme.weights.strategy == "tensor_group":
            whole["weight_global_scale"] = generate_gparam(low.amin(), high.amax())
        scale, zero = calculate_qparams(low, high, scheme.weights, whole.get("weight_global_scale"))
        state = {"weight": weights, "weight_scale": scale, "weight_zero_point": zero} | whole
        return compressor.compress(state, scheme)

    return run


def seconds(work: Callable[[], Any], repeats: int, clock: Callable[[], float]) -> float:
    work()
    taken = []
    for _ in range(repeats):
        start = clock()
        work()
        taken.append(clock() - start)
    return median(taken)


def report(args: argparse.Namespace, rates: dict[str, dict[str, float]], identical: bool) -> None:
    head = "  ".join(f"{threads:>2} thread{'s' if threads != '1' else ' '}" for threads in rates)
    print(f"{'GB of bf16 a second':<36}{head}")
    for name in next(iter(rates.values())):
        print(f"{name:<36}" + "  ".join(f"{rates[threads][name] / 1e9:>10.3f}" for threads in rates))
    ratios = {t: {name: round(r[name] / r[peer], 2) for name, peer in RATIOS.items()} for t, r in rates.items()}
    for threads, row in ratios.items():
        print(f"times its peer, {threads} threads: " + ", ".join(f"{name} {ratio}" for name, ratio in row.items()))
    print(f"bytes equal to bitsandbytes: {identical}")
    record = {
        "benchmark": "encode",
        "cpu": _cpu(),
        "versions": {name: version(name) for name in PACKAGES},
        "shape": [args.rows, args.columns],
        "clock": args.clock,
        "bytes_equal_bitsandbytes": identical,
        "gb_per_second": {t: {name: round(rate / 1e9, 4) for name, rate in r.items()} for t, r in rates.items()},
        "times_peer": ratios,
    }
    print(json.dumps(record))


def _unit(weights: torch.Tensor) -> Unit:
    return Unit(NAME, (TensorSpec("BF16", tuple(weights.shape), NAME),))


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")]
        if info.exists()
        else []
    )
    return f"{names[0] if names else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=3584)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
