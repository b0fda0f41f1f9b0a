"""Moments: sums of products of inputs, whole or in blocks, and what they refuse."""

import pytest
import torch

from bagel_compress.calibrate.moments import Moments
from bagel_compress.errors import CalibrationError


def rows(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_sums_of_products_whatever_the_pieces() -> None:
    x = rows(700, 600)
    moments = Moments(600)
    for piece in x.split(123):
        moments.add(piece)
    (block,) = moments.blocks()
    assert (block.start, block.stop, moments.rows) == (0, 600, 700)
    torch.testing.assert_close(block.h, x.T @ x, rtol=1e-4, atol=1e-3)
    assert torch.equal(block.h, block.h.T)
    torch.testing.assert_close(moments.diagonal(), x.square().sum(0), rtol=1e-4, atol=1e-3)


def test_rows_may_be_added_after_reading() -> None:
    moments, x = Moments(40), rows(60, 40)
    moments.add(x[:30])
    moments.blocks()
    moments.add(x[30:])
    torch.testing.assert_close(moments.blocks()[0].h, x.T @ x, rtol=1e-4, atol=1e-4)


def test_blocks_are_those_along_the_diagonal() -> None:
    x = rows(300, 250)
    moments = Moments(250, block=64)
    moments.add(x)
    blocks = moments.blocks()
    assert [(b.start, b.stop) for b in blocks] == [(0, 64), (64, 128), (128, 192), (192, 250)]
    for block in blocks:
        part = x[:, block.start : block.stop]
        torch.testing.assert_close(block.h, part.T @ part, rtol=1e-4, atol=1e-3)
    assert moments.nbytes == 4 * (3 * 64**2 + 58**2)


def test_cross_products_are_of_full_with_quantised_rows() -> None:
    x, full = rows(300, 40), rows(300, 40, seed=1)
    moments = Moments(40, cross=True)
    moments.add(x, full)
    cross = moments.blocks()[0].cross
    assert cross is not None
    torch.testing.assert_close(cross, full.T @ x, rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="full rows"):
        moments.add(x)


def test_bf16_rows_are_summed_in_fp32() -> None:
    x = rows(4096, 16).bfloat16()
    moments = Moments(16)
    moments.add(x)
    exact = (x.double().T @ x.double()).float()
    torch.testing.assert_close(moments.blocks()[0].h, exact, rtol=1e-5, atol=1e-3)


def test_too_few_rows_say_how_many_are_missing() -> None:
    moments = Moments(400)
    moments.add(rows(73, 400))
    with pytest.raises(CalibrationError, match=r"^x\.weight: .*73 rows.*width of 400.*at least 100.*27 more rows\.$"):
        moments.check("x.weight")
    blocks = Moments(400, block=200)  # each block of moments needs a quarter of its own width
    blocks.add(rows(73, 400))
    blocks.check("x.weight")


def test_equal_rows_are_refused() -> None:
    moments = Moments(8)
    moments.add(rows(1, 8).expand(50, 8))
    with pytest.raises(CalibrationError, match=r"^x\.weight: all 50 rows .* equal"):
        moments.check("x.weight")
    moments.add(rows(1, 8, seed=1))
    moments.check("x.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_refused(value: float) -> None:
    x = rows(50, 8)
    x[20, 3] = value
    moments = Moments(8)
    moments.add(x)
    with pytest.raises(CalibrationError, match=r"^x\.weight: .*NaN or Inf"):
        moments.check("x.weight")
