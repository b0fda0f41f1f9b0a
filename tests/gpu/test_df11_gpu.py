"""DF11 on a GPU: our CUDA and Triton kernels, and the package's own, against the CPU decoder; prefetching."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from bagel_compress.codecs import DF11
from bagel_compress.codecs.base import Unit
from bagel_compress.codecs.df11 import cuda_kernel, unpack
from bagel_compress.codecs.df11.device import Df11Unit
from bagel_compress.codecs.ring import UnitDecoder
from bagel_compress.io.tensor_spec import TensorSpec

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
CODEC = DF11()


def unit_of(rows: int, columns: int, name: str = "m", spread: float = 0.35) -> tuple[Unit, torch.Tensor]:
    rng = np.random.default_rng(rows)
    weights = rng.normal(0, 0.02, (rows, columns)) * np.exp(rng.normal(0, spread, (rows, 1)))
    return Unit(name, (TensorSpec("BF16", (rows, columns), f"{name}.weight"),)), torch.from_numpy(weights).bfloat16()


def on_gpu(unit: Unit, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    parts = CODEC.encode(unit, {spec.name: weights for spec in unit.specs})
    return {name: part.cuda() for name, part in parts.items()}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.cpu().view(torch.int16).flatten(), b.view(torch.int16).flatten())


SHAPES = [(3584, 3584, 0.35), (30, 40, 0.35), (1000, 1003, 8.0), (1, 1, 0.0), (512, 4096, 0.0)]


@pytest.mark.parametrize(("rows", "columns", "spread"), SHAPES)
def test_the_cuda_kernel_is_bit_exact(rows: int, columns: int, spread: float) -> None:
    assert cuda_kernel.available()
    unit, weights = unit_of(rows, columns, spread=spread)
    assert same(CODEC.decode(unit, on_gpu(unit, weights))["m.weight"], weights)


@pytest.mark.parametrize(("rows", "columns", "spread"), SHAPES)
def test_the_triton_kernel_is_bit_exact(rows: int, columns: int, spread: float) -> None:
    pytest.importorskip("triton")
    from bagel_compress.codecs.df11 import triton_kernel

    unit, weights = unit_of(rows, columns, spread=spread)
    parts = on_gpu(unit, weights)
    out = torch.zeros(weights.numel(), dtype=torch.bfloat16, device="cuda")
    table = torch.from_numpy(unpack.lookup_table(parts["m.luts"].cpu().numpy()).view(np.int64)).cuda()
    positions = parts["m.output_positions"].cpu().numpy().view("<u4").astype(np.int64)
    triton_kernel.decode(
        table, parts["m.luts"], parts["m.encoded_exponent"], parts["m.sign_mantissa"],
        torch.from_numpy(positions).cuda(), parts["m.gaps"], out,
    )  # fmt: skip
    assert same(out, weights)


@pytest.mark.parametrize(("rows", "columns", "spread"), SHAPES)
def test_the_official_kernel_reads_our_bytes(rows: int, columns: int, spread: float) -> None:
    from torch.cuda._utils import _cuda_load_module

    package = importlib.util.find_spec("dfloat11")
    if package is None or package.origin is None:
        pytest.skip("needs the dfloat11 package")
    kernel = _cuda_load_module((Path(package.origin).parent / "decode.ptx").read_bytes(), ["decode"])["decode"]
    unit, weights = unit_of(rows, columns, spread=spread)
    parts = on_gpu(unit, weights)
    positions = parts["m.output_positions"].cpu().numpy().view("<u4").astype(np.int64)
    out = torch.zeros(weights.numel(), dtype=torch.bfloat16, device="cuda")
    arrays = [parts[f"m.{s}"] for s in ("luts", "encoded_exponent", "sign_mantissa", "output_positions", "gaps")]
    shared = 4 * 512 + 4 + 2 * int(np.diff(positions).max())
    sizes = [arrays[0].shape[0], arrays[1].numel(), weights.numel()]
    kernel((len(positions) - 1, 1, 1), (512, 1, 1), [*arrays, out, *sizes], shared)
    assert same(out, weights)


def test_prefetched_units_give_their_weights() -> None:
    units = [unit_of(256 + 64 * k, 512, f"language_model.model.layers.{k}.mlp_moe_gen") for k in range(5)]
    stored = [(Df11Unit(unit, on_gpu(unit, weights)), weights) for unit, weights in units]
    decoder = UnitDecoder(torch.device("cuda", 0), keep_bytes=0)
    for one, _ in stored:
        decoder.expect(one)
    rng = np.random.default_rng(0)
    for k in [*range(5), *range(5), *range(5), *rng.integers(0, 5, 100).tolist()]:
        one, weights = stored[k]
        assert same(decoder.flat(one).clone(), weights)
