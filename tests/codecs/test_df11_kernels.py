"""The GPU kernels without a GPU: Triton in its interpreter, CUDA's functions compiled for the CPU. Bit-exact."""

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
from test_df11 import CASES, coded, from_exponents, mixed, two_powers

from bagel_compress.codecs.df11 import cuda_kernel, unpack

DRIVER = r"""
#define DF11_HOST
#include "kernel.cu"
#include <stdlib.h>
// The device kernel, with the threads of each phase in a row. `order` visits threads backwards if it is negative.
int decode_on_host(const u64 *table, const u8 *luts, int tables, const u8 *stream, int stream_bytes, const u8 *rest,
                   const u32 *positions, const u8 *gaps, int gap_bytes, u16 *out, int weights, int blocks,
                   int staging_bytes, int order) {
    struct Unit u = {table, luts, tables, stream, stream_bytes, rest, positions, gaps, gap_bytes, out, weights};
    struct Window *w = (struct Window *)malloc(THREADS * sizeof *w);
    u8 *staging = (u8 *)aligned_alloc(16, staging_bytes);
    int start[THREADS];
    for (int block = 0; block < blocks; ++block) {
        int first = (int)positions[block], stop = (int)positions[block + 1], total = 0;
        int shift = first & 7, end = shift + stop - first;
        if (end > staging_bytes) return 1;
        for (int t = 0; t < THREADS; ++t) count_window(&w[t], &u, table, luts, (long long)block * THREADS + t);
        for (int t = 0; t < THREADS; ++t) start[t] = total, total += w[t].count;
        for (int k = 0; k < THREADS; ++k) {
            int t = order < 0 ? THREADS - 1 - k : k;
            write_window(&w[t], &u, table, luts, staging, shift + start[t], end);
        }
        for (int k = 0; k < THREADS; ++k) merge_block(&u, staging, first, stop, order < 0 ? THREADS - 1 - k : k);
    }
    free(w);
    free(staging);
    return 0;
}
"""

TENSORS = {
    "trained-like": lambda: mixed(120, 250),
    "under one block": lambda: mixed(30, 40),
    "deep book": lambda: from_exponents(np.random.default_rng(1).permutation(two_powers(20_000))),
    **{case: (lambda case=case: from_exponents(CASES[case]()[:60_000])) for case in CASES},
}


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


@pytest.mark.parametrize("case", TENSORS)
@pytest.mark.parametrize("order", [1, -1])
def test_the_functions_of_the_cuda_kernel(host_kernel: ctypes.CDLL, case: str, order: int) -> None:
    tensor = TENSORS[case]()
    parts = coded(tensor)
    luts = parts["luts"].numpy()
    table = unpack.lookup_table(luts, cuda_kernel.LOOKUP_BITS)
    positions = parts["output_positions"].numpy().view("<u4")
    out = torch.zeros(tensor.numel() + 16, dtype=torch.int16)
    densest = int(np.diff(positions.astype(np.int64)).max())
    pointers = [ctypes.c_void_p(t.ctypes.data) for t in (table, luts)]
    stream, rest, gaps = (parts[name] for name in ("encoded_exponent", "sign_mantissa", "gaps"))
    assert all(t.data_ptr() % 16 == 0 for t in (stream, rest, out))
    failed = host_kernel.decode_on_host(
        *pointers, len(luts) - 1, ctypes.c_void_p(stream.data_ptr()), stream.numel(), ctypes.c_void_p(rest.data_ptr()),
        ctypes.c_void_p(positions.ctypes.data), ctypes.c_void_p(gaps.data_ptr()), gaps.numel(),
        ctypes.c_void_p(out.data_ptr()), tensor.numel(), len(positions) - 1, -(-(densest + 8) // 16) * 16, order,
    )  # fmt: skip
    assert not failed
    assert torch.equal(out[: tensor.numel()], tensor.view(torch.int16).flatten())
    assert not out[tensor.numel() :].any()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler")
@pytest.mark.parametrize("arch", ["sm_89", "sm_90"])
def test_the_cuda_kernel_compiles(arch: str, tmp_path: Path) -> None:
    (tmp_path / "kernel.cu").write_text(cuda_kernel.source())
    subprocess.run(["nvcc", f"-arch={arch}", "--ptx", "-o", "kernel.ptx", "kernel.cu"], cwd=tmp_path, check=True)


TRITON = """
import sys
sys.path.insert(0, {tests!r})
import numpy as np, torch
from test_df11 import coded
from test_df11_kernels import TENSORS
from bagel_compress.codecs.df11 import triton_kernel, unpack
for case in ("trained-like", "deep book", "two"):
    tensor = TENSORS[case]()
    parts = coded(tensor)
    out = torch.zeros(tensor.numel(), dtype=torch.bfloat16)
    table = torch.from_numpy(unpack.lookup_table(parts["luts"].numpy()).view(np.int64))
    positions = torch.from_numpy(parts["output_positions"].numpy().view("<u4").astype(np.int64))
    triton_kernel.decode(table, *(parts[n] for n in ("luts", "encoded_exponent", "sign_mantissa")), positions,
                         parts["gaps"], out)
    assert torch.equal(out.view(torch.int16), tensor.view(torch.int16).flatten()), case
"""


def test_triton_in_its_interpreter() -> None:
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    pytest.importorskip("triton")
    tests = str(Path(__file__).parent)
    subprocess.run(
        [sys.executable, "-c", TRITON.format(tests=tests)], env=os.environ | {"TRITON_INTERPRET": "1"}, check=True
    )
