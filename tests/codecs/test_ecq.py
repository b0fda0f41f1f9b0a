"""ecq: rates that are met, an independent reading of the format, and values of every kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from codec_weights import NAME, Whole, decoded, encoded, quality_of, same_bytes, snr_db, unit_of, weight
from pydantic import ValidationError

from bagel_compress.codecs import CODECS
from bagel_compress.codecs.ecq import Ecq, encode, pack, step
from bagel_compress.codecs.ecq.layout import HEADER_BYTES, RUN, bound
from bagel_compress.errors import CodecError
from bagel_compress.io.tensor_spec import TensorSpec

RATES = (1.5, 2.0, 2.5, 3.0, 4.13, 5.0, 6.0, 7.0, 8.5)


def rate_of(parts: dict[str, torch.Tensor], weights: int) -> float:
    return 8 * sum(part.nbytes for part in parts.values()) / weights


def heavy_tailed(*shape: int, seed: int = 0) -> torch.Tensor:
    """Rows and columns of unlike scale and one weight in 500 six times larger, as in trained weights."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * 0.02 * np.exp(rng.normal(0, 0.3, (shape[0], 1)))
    values *= np.exp(rng.normal(0, 0.25, (1, shape[1])))
    values[rng.random(shape) < 0.002] *= 6
    return torch.from_numpy(values).bfloat16()


@pytest.mark.parametrize("bits", RATES)
@pytest.mark.parametrize("make", [weight, heavy_tailed], ids=["normal", "heavy-tailed"])
def test_the_rate_is_met_and_never_exceeded(bits: float, make: Callable[..., torch.Tensor]) -> None:
    tensor = make(256, 1024)
    rate = rate_of(encoded(Ecq(bits=bits), tensor), tensor.numel())
    assert bits - 0.02 <= rate <= bits


@pytest.mark.parametrize("bits", RATES)
def test_redundancy_over_the_entropy_of_the_codes(bits: float) -> None:
    """At most 0.08 bits per weight with lengths and book, 0.035 at common rates, on half of the 7B model's k_proj."""
    tensor = weight(512, 1792)
    codec = Ecq(bits=bits)
    parts = encoded(codec, tensor)
    codes = torch.round(tensor.double() / parts[f"{NAME}.step"].double())
    _, counts = codes.unique(return_counts=True)
    share = counts.double() / counts.sum()
    entropy = float(-(share * share.log2()).sum())
    assert 0 <= rate_of(parts, tensor.numel()) - entropy <= (0.035 if 2.5 <= bits <= 6 else 0.08)


def test_error_is_that_of_a_uniform_grid() -> None:
    """Normal weights at 4.13 bits: 2^-R sqrt(pi e / 6) is 0.0681, and the redundancy costs 2 %; NF4's is 0.0925."""
    tensor = weight(512, 1792)
    error = 10 ** (-snr_db(tensor, decoded(Ecq(bits=4.13), tensor)) / 20)
    assert 0.068 < error < 0.070


def test_more_bits_give_less_error() -> None:
    tensor = heavy_tailed(128, 512)
    levels = [snr_db(tensor, decoded(Ecq(bits=bits), tensor)) for bits in RATES]
    assert levels == sorted(levels)
    assert levels[-1] - levels[0] > 6 * (RATES[-1] - RATES[0])  # 6 dB a bit, more where few bits are


@pytest.mark.parametrize("bits", [2.5, 4.13, 7.0])
def test_quality_is_what_decoding_gives(bits: float) -> None:
    tensor = heavy_tailed(64, 300)
    codec = Ecq(bits=bits)
    assert quality_of(codec, tensor).snr_db == pytest.approx(snr_db(tensor, decoded(codec, tensor)), abs=1e-6)


def reference(parts: dict[str, torch.Tensor], weights: int) -> np.ndarray:
    """The decoder of layout.py in words: bf16 words, bit by bit, one weight at a time."""
    stream = parts[f"{NAME}.stream"].numpy().tobytes()
    book = parts[f"{NAME}.book"].numpy().astype(int)
    low_bits, first, escape = book[:3].tolist()
    frequencies = dict(enumerate(book[3:].tolist(), first)) | {255: escape}
    spread, place = [0] * 4096, 0
    for symbol, frequency in frequencies.items():
        for _ in range(frequency):
            spread[place] = symbol
            place = (place + 2563) % 4096
    seen, table = dict(frequencies), []
    for symbol in spread:
        bits = 12 - (seen[symbol].bit_length() - 1)
        table.append((symbol, bits, (seen[symbol] << bits) - 4096))
        seen[symbol] += 1
    values, start = [], 0
    for run, size in enumerate(parts[f"{NAME}.run_bytes"].numpy().astype(int).tolist()):
        data = int.from_bytes(stream[start : start + size], "little")
        count = min(RUN, weights - run * RUN)
        plane = -(-count // 8)
        state, at, symbols = data & 4095, 16 + 8 * low_bits * plane + (data >> 12 & 15), []
        for _ in range(count):
            symbol, bits, base = table[state]
            symbols.append(symbol)
            state = base + (data >> at & ((1 << bits) - 1))
            at += bits
        assert state == 0
        rest = 8 * size
        for i, symbol in enumerate(symbols):
            if symbol == 255:
                rest -= 16
                values.append(data >> rest & 0xFFFF)
                continue
            low = sum((data >> (16 + 8 * plane * bit + i) & 1) << bit for bit in range(low_bits))
            value = torch.tensor(float(((symbol - 127) << low_bits) + low)) * parts[f"{NAME}.step"]
            values.append(int(value.bfloat16().view(torch.int16)) & 0xFFFF)
        assert at == rest
        start += size
    assert start == len(stream)
    return np.array(values, np.uint16)


@pytest.mark.parametrize(("bits", "shape"), [(2.5, (3, 1000)), (4.13, (5, 999)), (6.5, (2, 1025)), (8.5, (1, 2049))])
def test_an_independent_reading_of_the_format(bits: float, shape: tuple[int, int]) -> None:
    tensor = heavy_tailed(*shape)
    tensor[0, 3] = 5.0
    codec = Ecq(bits=bits)
    parts = encoded(codec, tensor)
    back = codec.decode(unit_of(tensor), parts)[NAME]
    words = back.view(torch.int16).numpy().view(np.uint16).reshape(-1)
    assert np.array_equal(reference(parts, tensor.numel()), words)
    assert back[0, 3] == 5.0  # beyond 8 bits: stored as it is


def single(*values: float) -> torch.Tensor:
    return torch.tensor([values]).bfloat16()


ODD = {
    "zeros": lambda: torch.zeros(7, 300).bfloat16(),
    "constant": lambda: torch.full((7, 300), 0.3).bfloat16(),
    "one": lambda: single(-0.7),
    "two": lambda: single(3.0, -1e-3),
    "two values": lambda: weight(40, 300).sign().mul(0.11).bfloat16(),
    "subnormal": lambda: weight(40, 300, scale=1e-40),
    "largest": lambda: weight(40, 300, scale=1e37),
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("bits", [1.5, 4.13, 8.5])
def test_odd_tensors(case: str, bits: float) -> None:
    tensor = ODD[case]()
    codec = Ecq(bits=bits)
    parts = encoded(codec, tensor)
    assert sum(part.nbytes for part in parts.values()) <= codec.nbytes(unit_of(tensor))
    back = codec.decode(unit_of(tensor), parts)[NAME]
    assert back.isfinite().all()
    if case == "zeros":
        assert not back.any()
    if case in ("constant", "one", "two values") or (case == "two" and bits > 8):
        assert torch.allclose(back.float(), tensor.float(), rtol=0.02)


@pytest.mark.parametrize("outlier", [200.0, 1e30])
def test_an_outlier_is_kept_and_spoils_nothing(outlier: float) -> None:
    """10^4 and 10^31 deviations: it comes back exactly, and the others as they would without it."""
    tensor = weight(64, 1024)
    plain = snr_db(tensor, decoded(Ecq(), tensor))
    tensor[17, 5] = outlier
    back = decoded(Ecq(), tensor)
    assert back[17, 5] == tensor[17, 5]
    others = torch.ones_like(tensor, dtype=torch.bool)
    others[17, 5] = False
    assert snr_db(tensor[others], back[others]) > plain - 0.05


def test_weights_beyond_every_step_are_refused() -> None:
    with pytest.raises(CodecError, match=rf"{NAME}: holds a weight of 9.97e\+37.*raw"):
        encoded(Ecq(), torch.full((4, 4), 1e38).bfloat16())


@pytest.mark.parametrize("bits", [1.49, 8.51, -1, math.nan, math.inf])
def test_rates_that_it_does_not_have(bits: float) -> None:
    with pytest.raises(ValidationError):
        Ecq(bits=bits)


def test_bytes_do_not_depend_on_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = heavy_tailed(40, 517)
    whole = encoded(Ecq(), tensor)
    monkeypatch.setattr(encode, "BATCH", 2 * RUN)
    pieces = encoded(Ecq(), tensor)
    assert all(same_bytes(whole[name], pieces[name]) for name in whole)


def test_codes_that_the_coder_misjudges_still_fit() -> None:
    """Sorted weights: the coder's states are nothing like what frequencies promise, run by run."""
    tensor = heavy_tailed(64, 1024).flatten().sort().values.view(64, 1024)
    for bits in (2.5, 4.13, 7.0):
        rate = rate_of(encoded(Ecq(bits=bits), tensor), tensor.numel())
        assert bits - 0.02 <= rate <= bits


class Changing(Whole):
    """A weight that is another one at its second reading."""

    def __init__(self, readings: list[torch.Tensor]) -> None:
        super().__init__(readings[0])
        self._readings = iter(readings)

    def read(self, spec: TensorSpec, start: int, stop: int) -> torch.Tensor:
        return Whole(next(self._readings)).read(spec, start, stop)


def test_a_source_that_changes_is_noticed() -> None:
    """Also where all words of the second reading were among those of the first."""
    tensor = weight(64, 1024)
    for rows in (torch.full((1024,), 17.0), tensor[1]):
        second = tensor.clone()
        second[0] = rows
        with pytest.raises(CodecError, match=f"{NAME}: .*source was changed"):
            Ecq().begin(unit_of(tensor), Changing([tensor, second]))


def test_words_that_moved_are_noticed() -> None:
    words = np.arange(1, 1025, dtype=np.uint16)
    moved = words.copy()
    moved[[100, 101]] = words[[101, 100]]
    assert encode.Batch(0, words).checksum != encode.Batch(0, moved).checksum


def test_weights_of_zeros_take_their_runs_headers_alone() -> None:
    parts = encoded(Ecq(bits=7.5), torch.zeros(3, RUN, dtype=torch.bfloat16))
    assert parts[f"{NAME}.stream"].numel() == 3 * HEADER_BYTES


@pytest.mark.parametrize("run", range(6))
def test_a_run_that_is_packed_wrongly_is_noticed(run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever it is: four whole runs that are read together, one alone, and a shorter last one."""
    tensor, packed = weight(1, 5 * RUN + 700), pack.pack

    def spoilt(*given: Any) -> int:
        size = packed(*given)
        out, sizes = given[-2], given[-1]
        out[sizes[:run].sum() + sizes[run] // 2] ^= 16
        return size

    monkeypatch.setattr(pack, "pack", spoilt)
    with pytest.raises(CodecError, match="did not come back"):
        Ecq().begin(unit_of(tensor), Whole(tensor))


def test_sizes_of_a_plan() -> None:
    unit = unit_of(torch.empty(18944, 3584, dtype=torch.bfloat16, device="meta"))
    assert Ecq(bits=4.13).nbytes(unit) == math.floor(18944 * 3584 * 4.13 / 8)
    assert bound(1, 1.5).nbytes < 32


def test_steps_are_fp32_numbers_in_order() -> None:
    steps = [step.step_at(index) for index in range(-3000, 3000)]
    assert steps == sorted(set(steps))
    assert all(float(np.float32(s)) == s for s in steps)
    assert [step.index_of(s) for s in steps] == list(range(-3000, 3000))


def test_it_is_listed() -> None:
    assert Ecq in CODECS
