"""The product with one row: torch's to rounding, whatever the shape; what it does not take goes to torch."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

import bagel
from bagel import one_row as module
from bagel.layers import RMSNorm
from bagel.one_row import Linear, fits, norm_fits, one_norm, one_row
from bagel.sampler import Sampler, TextSettings

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every size is taken, threads share every product, and no test wants gradients."""
    monkeypatch.setattr(module, "SMALLEST", 0)
    monkeypatch.setattr(module, "SHARED", 0)
    monkeypatch.setattr(module, "SMALLEST_ROW", 0)
    with torch.no_grad():
        yield


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (4, 16), (7, 33), (18, 100), (64, 257), (130, 1000)])
def test_products_of_any_shape(rows: int, columns: int, with_bias: bool, dtype: torch.dtype) -> None:
    """fp32 is near the exact product; bf16 is the exact product rounded once, but where it lies between two."""
    x, weight = numbers(1, columns, dtype=dtype), numbers(rows, columns, dtype=dtype, seed=1)
    bias = numbers(rows, dtype=dtype, seed=2) if with_bias else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    scale = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    found = one_row(x, weight, bias)
    assert found.dtype == dtype
    assert found.shape == (1, rows)
    unit = torch.finfo(torch.float32).eps * columns**0.5 * scale
    if dtype == torch.bfloat16:
        unit += exact.abs() * torch.finfo(dtype).eps / 2
    assert ((found.double() - exact).abs() <= unit).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    x, weight, before = numbers(1, 300, dtype=dtype), numbers(203, 300, dtype=dtype, seed=1), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 64):
            torch.set_num_threads(threads)
            found.append(one_row(x, weight))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found)


def test_runs_of_two_python_threads_do_not_mix() -> None:
    weight, rows = numbers(512, 512), [numbers(1, 512, seed=seed) for seed in range(8)]
    wanted, found = [one_row(x, weight) for x in rows], {}

    def work(index: int) -> None:
        found[index] = [one_row(rows[index], weight) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(y, wanted[index]) for index, ys in found.items() for y in ys)
    assert len(found) == 8


def test_nan_infinity_and_overflow_are_what_torch_gives() -> None:
    weight = torch.tensor([[1.0, 0.0], [torch.nan, 1.0], [torch.inf, 1.0], [3e38, 3e38], [-torch.inf, torch.inf]])
    for dtype in DTYPES:
        x = torch.tensor([[2.0, 1.0]]).to(dtype)
        assert torch.equal(one_row(x, weight.to(dtype)).nan_to_num(7), F.linear(x, weight.to(dtype)).nan_to_num(7))
    words = torch.full((1, 1), -1, dtype=torch.int16).view(torch.bfloat16)  # a NaN whose rounding would overflow
    assert one_row(torch.ones(1, 1, dtype=torch.bfloat16), words).isnan().all()


def test_what_it_takes() -> None:
    x, weight = numbers(1, 6), numbers(4, 6)
    assert fits(x, weight)
    assert fits(x.bfloat16(), weight.bfloat16())
    assert not fits(x.half(), weight.half())
    assert not fits(x.bfloat16(), weight)
    assert not fits(x.to("meta"), weight.to("meta"))
    assert not fits(x, numbers(6, 4).T)
    assert not fits(x, numbers(4, 12)[:, ::2])
    with torch.enable_grad():
        assert not fits(x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_module_is_torch_s_for_the_rest(dtype: torch.dtype) -> None:
    linear = Linear(6, 4).to(dtype)
    for x in (numbers(3, 6), numbers(6), numbers(1, 1, 6), numbers(0, 6)):
        assert torch.equal(linear(x.to(dtype)), F.linear(x.to(dtype), linear.weight, linear.bias))
    x = numbers(1, 6).to(dtype)
    assert torch.equal(linear(x), one_row(x, linear.weight, linear.bias))
    linear.weight = torch.nn.Parameter(numbers(6, 4).to(dtype).T)
    assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))
    with torch.enable_grad():
        linear(x).sum().backward()
    assert linear.weight.grad is not None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5), (1, 1024), (1, 8, 128), (1, 3, 17)])
def test_a_norm_of_one_row(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the module computes it; in bf16 a sum in another order may move a number to its neighbour, and no further."""
    norm = RMSNorm(shape[-1], 1e-6).to(dtype)
    norm.weight.copy_(numbers(shape[-1], seed=1))
    x = 30 * numbers(*shape, dtype=dtype, seed=2)
    found = norm(x)
    assert torch.equal(found, one_norm(x, norm.weight, 1e-6))
    monkeypatch.setattr(module, "SMALLEST_ROW", 1 << 60)
    wanted = norm(x)
    assert found.dtype == dtype
    assert torch.allclose(found, wanted, rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert (found == wanted).float().mean() > (0.98 if dtype == torch.bfloat16 else 0.2)


def test_norms_it_does_not_take() -> None:
    x, weight = numbers(1, 4, 6), numbers(6)
    assert norm_fits(x, weight)
    assert not norm_fits(numbers(2, 6), weight)
    assert not norm_fits(x.transpose(0, 1), weight)
    assert not norm_fits(numbers(1, 6, 4).transpose(1, 2), weight)
    assert not norm_fits(x, weight.bfloat16())
    with torch.enable_grad():
        assert not norm_fits(x, weight)


def test_without_numba_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bagel.one_row_kernel", None)
    monkeypatch.delattr(bagel, "one_row_kernel", raising=False)
    module._kernels.cache_clear()
    try:
        assert not fits(numbers(1, 6), numbers(4, 6))
    finally:
        module._kernels.cache_clear()


def test_function_modes_see_the_call() -> None:
    class Seen(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            calls.append(func)
            return func(*args, **(kwargs or {}))

    calls: list[object] = []
    x, weight = numbers(1, 6), numbers(4, 6)
    with Seen():
        one_row(x, weight)
    assert one_row in calls


def test_text_is_the_same_with_it(fp32: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TextSettings(max_tokens=12)
    found = fp32.run(["a red cat"], output="text", text=settings)
    monkeypatch.setattr(module, "SMALLEST", 1 << 60)
    assert found.ids == fp32.run(["a red cat"], output="text", text=settings).ids


def test_a_small_model_does_not_load_the_compiler() -> None:
    code = (
        "import sys; from bagel_compress.run.load import open_model\n"
        "from bagel_compress.io.packaged import resource\n"
        "from bagel.sampler import TextSettings\n"
        "open_model(resource('BAGEL-nano')).run(['a red circle'], output='text', text=TextSettings(max_tokens=2))\n"
        "print('bagel.one_row_kernel' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
