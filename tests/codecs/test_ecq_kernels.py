"""ecq's GPU kernels without a GPU: Triton in its interpreter, CUDA's functions compiled for the CPU. Bit-exact."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from codec_weights import NAME, encoded, unit_of, weight

from bagel_compress.codecs.ecq import Ecq, cuda_kernel, unpack
from bagel_compress.codecs.ecq.decode import Stored, check_parts
from bagel_compress.codecs.ecq.layout import RUN

DRIVER = r"""
#define ECQ_HOST
#include "kernel.cu"
void decode_on_host(const u32 *table, const u8 *stream, long long bytes, const long long *offsets, int low_bits,
                    float step, const float *column_steps, int width, long long weights, int first, int last,
                    u16 *out) {
    struct Weight w = {stream, bytes, offsets, low_bits, step, width ? column_steps : 0, width, weights};
    for (int run = first; run < last; ++run) decode_run(&w, table, run, out + (long long)(run - first) * RUN);
}
"""


def outliers() -> torch.Tensor:
    tensor = weight(3, 1000)
    tensor[1, ::50] = 9.0
    return tensor


TENSORS = {
    "normal": (4.13, lambda: weight(5, 1000)),
    "few bits": (1.5, lambda: weight(4, 1024)),
    "low bits": (7.5, lambda: weight(3, 1001)),
    "escapes": (4.13, outliers),
    "escapes and low bits": (7.5, outliers),
    "short": (7.5, lambda: outliers()[:1, 145:180].contiguous()),
    "one": (4.13, lambda: weight(1, 1)),
    "constant": (4.13, lambda: torch.full((3, 1000), 0.25).bfloat16()),
}


def case_of(case: str, columns: bool) -> tuple[Stored, torch.Tensor]:
    """Stored parts and the weight that the CPU's decoder makes of them."""
    bits, make = TENSORS[case]
    tensor, codec = make(), Ecq(bits=bits)
    parts = encoded(codec, tensor)
    if columns:
        generator = torch.Generator().manual_seed(3)
        parts[f"{NAME}.column_steps"] = torch.rand(tensor.shape[1], generator=generator).add(0.5).bfloat16()
    unit = unit_of(tensor)
    return check_parts(unit, parts), codec.decode(unit, parts)[NAME]


@pytest.fixture(scope="module")
def host_kernel(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("kernel")
    (folder / "kernel.cu").write_text(cuda_kernel.source())
    (folder / "driver.c").write_text(DRIVER)
    command = [compiler, "-O1", "-std=gnu11", "-Wall", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover"]
    subprocess.run([*command, "-shared", "-fPIC", "-o", "kernel.so", "driver.c"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "kernel.so"))


def on_host(kernel: ctypes.CDLL, stored: Stored, first: int, last: int) -> torch.Tensor:
    """Runs [first, last) by the CUDA kernel's functions, and 16 more elements that it must leave alone."""
    table = unpack.decoder(stored.book.frequencies)
    columns, stream = np.ascontiguousarray(stored.column_steps), stored.stream.clone()
    out = torch.zeros(min(last * RUN, stored.weights) - first * RUN + 16, dtype=torch.int16)
    address = ctypes.c_void_p
    kernel.decode_on_host(
        address(table.ctypes.data), address(stream.data_ptr()), ctypes.c_longlong(stream.numel()),
        address(stored.offsets.ctypes.data), stored.book.low_bits, ctypes.c_float(stored.step),
        address(columns.ctypes.data), columns.size, ctypes.c_longlong(stored.weights), first, last,
        address(out.data_ptr()),
    )  # fmt: skip
    return out


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("case", TENSORS)
def test_the_functions_of_the_cuda_kernel(host_kernel: ctypes.CDLL, case: str, columns: bool) -> None:
    stored, expected = case_of(case, columns)
    flat = expected.view(torch.int16).flatten()
    for first in range(min(2, stored.runs)):
        out = on_host(host_kernel, stored, first, stored.runs)
        assert torch.equal(out[:-16], flat[first * RUN :])
        assert not out[-16:].any()


def test_damage_does_not_lead_the_cuda_kernel_astray(host_kernel: ctypes.CDLL) -> None:
    """It gives some weights; the sanitizer would end the process where it leaves its buffers' types or ranges."""
    stored, _ = case_of("escapes and low bits", False)
    rng = np.random.default_rng(0)
    for _ in range(50):
        stored.stream[:] = torch.from_numpy(rng.integers(0, 256, stored.stream.numel()).astype(np.uint8))
        assert not on_host(host_kernel, stored, 0, stored.runs)[-16:].any()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler")
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90"])
def test_the_cuda_kernel_compiles(arch: str, tmp_path: Path) -> None:
    (tmp_path / "kernel.cu").write_text(cuda_kernel.source())
    subprocess.run(["nvcc", f"-arch={arch}", "--ptx", "-o", "kernel.ptx", "kernel.cu"], cwd=tmp_path, check=True)


TRITON = """
import sys
sys.path.insert(0, {tests!r})
import torch
from test_ecq_kernels import case_of
from bagel_compress.codecs.ecq import triton_kernel
for case, columns in {cases}:
    stored, expected = case_of(case, columns)
    out = torch.zeros(stored.weights, dtype=torch.bfloat16)
    triton_kernel.runs(stored)(0, stored.runs, out)
    assert torch.equal(out.view(torch.int16), expected.view(torch.int16).flatten()), case
"""


def in_the_interpreter(*cases: tuple[str, bool]) -> None:
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    pytest.importorskip("triton")
    program = TRITON.format(tests=str(Path(__file__).parent), cases=cases)
    subprocess.run([sys.executable, "-c", program], env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)


def test_triton_in_its_interpreter() -> None:
    in_the_interpreter(("short", False), ("short", True))


@pytest.mark.slow
def test_triton_in_its_interpreter_on_several_runs() -> None:
    in_the_interpreter(("normal", False), ("escapes and low bits", True))
