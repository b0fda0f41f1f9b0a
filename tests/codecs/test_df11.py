"""DF11 against the installed `dfloat11` compressor, byte for byte, and against an emulator of its kernel."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from dfloat11_official import compress, emulate, package, quiet

from bagel_compress.codecs import DF11
from bagel_compress.codecs.base import InMemory, Unit
from bagel_compress.codecs.df11 import encode, pack, unpack
from bagel_compress.codecs.df11.book import huffman, make_book, stalls
from bagel_compress.codecs.df11.decode import _check_tables
from bagel_compress.codecs.df11.layout import BLOCK_BITS, MAX_BLOCK_WEIGHTS, SUFFIXES
from bagel_compress.codecs.kernels.threads import Workspaces
from bagel_compress.errors import CodecError, PlanError
from bagel_compress.io.tensor_spec import TensorSpec

CODEC = DF11()
pytestmark = pytest.mark.filterwarnings("ignore:pkg_resources", "ignore:The given NumPy array is not writable")


def unit_of(*tensors: torch.Tensor, name: str = "m") -> tuple[Unit, dict[str, torch.Tensor]]:
    """A unit of 2-D bf16 tensors as one module with several linears, or as one linear."""
    names = [f"{name}.weight"] if len(tensors) == 1 else [f"{name}.l{k}.weight" for k in range(len(tensors))]
    specs = tuple(TensorSpec("BF16", tuple(t.shape), n) for n, t in zip(names, tensors, strict=True))
    return Unit(name, specs), dict(zip(names, tensors, strict=True))


def from_exponents(exponents: np.ndarray, seed: int = 0) -> torch.Tensor:
    """bf16 [1, n] with these exponents, signs and mantissas at random."""
    rest = np.random.default_rng(seed).integers(0, 1 << 16, len(exponents), dtype=np.uint16) & 0x807F
    words = (rest | (exponents.astype(np.uint16) << 7)).view(np.int16)
    return torch.from_numpy(words).view(torch.bfloat16)[None]


def coded(*tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    """Parts by suffix, after a check that our decoder gives the tensors back."""
    unit, named = unit_of(*tensors)
    parts = CODEC.encode(unit, named)
    for name, tensor in CODEC.decode(unit, parts).items():
        assert torch.equal(tensor.view(torch.int16), named[name].view(torch.int16))
    return {suffix: parts[f"m.{suffix}"] for suffix in SUFFIXES}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    for suffix in SUFFIXES:
        assert ours[suffix].shape == theirs[suffix].shape, suffix
        assert torch.equal(ours[suffix], theirs[suffix]), suffix


def small(kind: str, rng: np.random.Generator) -> torch.Tensor:
    n = int(rng.integers(2, 4000))
    if kind == "random":
        exponents = rng.integers(90, 90 + int(rng.integers(2, 100)), n)
    elif kind == "skewed":
        exponents = 120 - rng.geometric(float(rng.uniform(0.2, 0.7)), n).clip(max=100)
    elif kind == "constant":
        exponents = np.full(n, 100)
        exponents[: n // 7] = rng.integers(90, 99, n // 7)
    else:
        exponents = rng.normal(118, 2, n).round().astype(int).clip(90, 130)
        exponents[rng.integers(0, n, 1 + n // 500)] = rng.integers(0, 240, 1 + n // 500)
    return from_exponents(exponents, int(rng.integers(1 << 30)))


@pytest.mark.parametrize("kind", ["random", "skewed", "constant", "outliers"])
def test_small_tensors_equal_the_official_bytes(kind: str) -> None:
    rng = np.random.default_rng(list(kind.encode()))
    compared = 0
    for _ in range(120):
        tensor = small(kind, rng)
        ours = coded(tensor)
        assert torch.equal(emulate(ours).view(torch.int16), tensor.view(torch.int16)[0])
        try:
            theirs = compress(tensor)
        except UnboundLocalError:  # the root has no key 0
            continue
        assert_same(ours, theirs)
        compared += 1
    assert compared > 80


def test_several_tensors_share_a_book_in_order() -> None:
    rng = np.random.default_rng(5)
    tensors = [torch.from_numpy(rng.normal(0, 0.02 * (k + 1), (17, 31 + k))).bfloat16() for k in range(5)]
    ours = coded(*tensors)
    assert_same(ours, compress(*tensors))
    assert ours["split_positions"].tolist() == np.cumsum([t.numel() for t in tensors])[:-1].tolist()


def mixed(rows: int, columns: int) -> torch.Tensor:
    """Trained-like: normal, log-normal row and column scales, one weight in 500 six times larger."""
    rng = np.random.default_rng(rows)
    weights = rng.normal(0, 0.02, (rows, columns)) * np.exp(rng.normal(0, 0.35, (rows, 1)))
    weights *= np.exp(rng.normal(0, 0.25, (1, columns)))
    return torch.from_numpy(weights * np.where(rng.random((rows, columns)) < 0.002, 6, 1)).bfloat16()


def test_a_tensor_over_several_chunks_and_blocks_equals_the_official_bytes() -> None:
    assert_same(coded(mixed(300, 700)), compress(mixed(300, 700)))


@pytest.mark.parametrize(("batch", "columns"), [(1, 40), (3, 40), (1000, 700), (70_000, 700)])
def test_batches_that_end_within_a_byte_equal_the_official_bytes(
    batch: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BATCH", batch)
    monkeypatch.setattr(encode, "_buffers", Workspaces(encode.EncodingBuffers))  # of that size
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        tensors = [mixed(rows, columns) for rows in (5, 300, 1)]
        assert_same(coded(*tensors), compress(*tensors))
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1024, 3584), (2048, 2100)])
def test_millions_of_weights_equal_the_official_bytes(shape: tuple[int, int]) -> None:
    assert_same(coded(mixed(*shape)), compress(mixed(*shape)))


def ends_at(bits_mod_64: int, spill: bool) -> np.ndarray:
    """Exponents whose stream ends at this bit of a window, by a code that begins in the window before or in it."""
    rng = np.random.default_rng(bits_mod_64)
    while True:
        exponents = 110 - rng.geometric(0.45, int(rng.integers(200, 400))).clip(max=12)
        exponents = np.append(exponents, exponents.min() if spill else 109)  # the rarest has the longest code
        lengths = make_book(np.bincount(exponents, minlength=256)).lengths.astype(int)[exponents]
        total = int(lengths.sum())
        if total % 64 == bits_mod_64 and ((total - lengths[-1]) // 64 < total // 64) == spill:
            return exponents


@pytest.mark.parametrize(("bits", "spill"), [(0, True), (1, True), (3, True), (8, True), (8, False), (13, False)])
def test_the_last_window(bits: int, spill: bool) -> None:
    exponents = ends_at(bits, spill)
    assert_same(coded(from_exponents(exponents)), compress(from_exponents(exponents)))


def test_the_last_code_spills_into_a_new_block() -> None:
    """The official list of positions is one entry short if that end is byte-aligned; the kernel then reads past it."""
    found = {}
    base = np.repeat([100, 101, 102, 103], [9000, 2500, 1200, 1200])
    for extra in range(0, 400):
        tensor = from_exponents(np.random.default_rng(7).permutation(np.concatenate([base, np.full(extra, 103)])))
        ours = coded(tensor)
        lengths = ours["luts"][-1].numpy().astype(int)
        exponents = (tensor.view(torch.int16).numpy().view(np.uint16)[0] >> 7) & 255
        ends = np.cumsum(lengths[exponents])
        if ends[-1] > 32768 and ends[-2] < 32768:
            found[bool(ends[-1] % 8)] = tensor
            assert np.array_equal(ours["output_positions"].numpy().view("<u4"), [0, tensor.numel(), tensor.numel()])
            assert torch.equal(emulate(ours).view(torch.int16), tensor.view(torch.int16)[0])
    for tensor in found.values():
        theirs, ours = compress(tensor), coded(tensor)
        if theirs["output_positions"].numel() == ours["output_positions"].numel():
            assert_same(ours, theirs)


def two_powers(n: int) -> np.ndarray:
    """Counts 1, 1, 2, 3, 5, ...: the deepest book there is."""
    counts = [1, 1]
    while sum(counts) < n:
        counts.append(counts[-1] + counts[-2])
    return np.repeat(np.arange(100, 100 + len(counts)), counts)


def test_deep_books_equal_the_official_bytes() -> None:
    exponents = np.random.default_rng(1).permutation(two_powers(60_000))
    ours = coded(from_exponents(exponents))
    assert ours["luts"][-1].max() > 16
    assert_same(ours, compress(from_exponents(exponents)))


def doubling(symbols: int) -> np.ndarray:
    """Counts 1, 2, 4, ...: every symbol's code is one bit longer than the next one's."""
    counts = np.zeros(256, np.int64)
    counts[100 - np.arange(symbols)] = 1 << np.arange(symbols)
    return counts


@pytest.mark.parametrize("symbols", [20, 31, 32, 33, 34, 40, 50])
def test_limited_books_equal_the_official_ones(symbols: int) -> None:
    """More than 32 symbols with such counts would need longer codes; tens of millions of weights, so counts alone."""
    counts = doubling(symbols)
    _, utils = package()
    with quiet():
        _, _, table = utils.get_32bit_codec({int(e): int(counts[e]) for e in np.flatnonzero(counts)})
        luts = utils.get_luts(table)
    book = make_book(counts)
    assert (max(c.bits for c in huffman(counts)) > 32) == (symbols > 32)
    assert np.array_equal(book.luts, luts.numpy())
    _check_tables("unit", book.luts)  # codes of 32 bits are taken
    assert {c.symbol: (c.bits, c.value) for c in book.codes if c.symbol >= 0} == {
        s: code for s, code in table.items() if isinstance(s, int)
    }


def test_a_code_that_ends_before_its_table_is_damage() -> None:
    """Codes of 1 to 7 bits, a slot to spare, and a second table for a code of 8 bits, which the first would hold."""
    luts, slot = np.zeros((3, 256), np.uint8), 0
    for bits in range(1, 8):
        luts[0, slot : slot + (256 >> bits)] = 10 + bits
        luts[2, 10 + bits] = bits
        slot += 256 >> bits
    luts[0, 254], luts[0, 255] = 11, 255
    luts[1], luts[2, 20] = 20, 8
    with pytest.raises(CodecError, match="no complete prefix code"):
        _check_tables("unit", luts)


def test_a_tie_in_the_limiter_is_resolved_by_the_smaller_exponent() -> None:
    """numpy's partition, which the official code asks, may choose any of the tied; ours must not depend on it."""
    counts = doubling(34)
    counts[95] = counts[96]  # the fifth and sixth rarest; five have to be counted as 1
    limited = counts.copy()
    limited[[95, 97, 98, 99, 100]] = 1
    assert max(c.bits for c in huffman(counts)) > 32 >= max(c.bits for c in huffman(limited))
    assert make_book(counts).codes == huffman(limited)


CASES: dict[str, Callable[[], np.ndarray]] = {
    "one": lambda: np.array([120]),
    "two": lambda: np.array([120, 3]),
    "zeros": lambda: np.zeros(100_000, int),
    "constant": lambda: np.full(70_000, 118),
    "mostly zero": lambda: np.where(np.arange(200_000) % 1000, 0, 118 - np.arange(200_000) // 1000 % 9),
    "a zero half": lambda: np.where(np.arange(300_000) < 150_000, 0, 110 + np.arange(300_000) % 13),
    "every exponent": lambda: np.arange(240).repeat(40),
    "many tables": lambda: np.concatenate([np.full(239 * 512, 0), np.arange(1, 240).repeat(512)]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_official_kernel_reads_what_its_encoder_cannot_make(case: str) -> None:
    tensor = from_exponents(CASES[case]())
    assert torch.equal(emulate(coded(tensor)).view(torch.int16), tensor.view(torch.int16)[0])


@pytest.mark.parametrize("word", [0x7F80, 0x7FC0, 0xFF80, 0x7800], ids=["Inf", "NaN", "-Inf", "2^113"])
def test_large_exponents_stay_raw_with_a_reason(word: int) -> None:
    tensor = mixed(20, 50)
    tensor.view(torch.int16)[3, 4] = np.array(word, np.uint16).view(np.int16).item()
    unit, named = unit_of(tensor, mixed(20, 50))
    encoding = CODEC.begin(unit, InMemory(named))
    assert encoding.codec.format == "raw"
    assert "1 of 2,000 weights" in encoding.reason
    parts = CODEC.encode(unit, named)
    assert set(parts) == set(named)
    for name, stored in encoding.codec.decode(unit, parts).items():
        assert torch.equal(stored.view(torch.int16), named[name].view(torch.int16))


def test_no_weights_stay_raw() -> None:
    unit, named = unit_of(torch.empty(0, 4, dtype=torch.bfloat16))
    assert CODEC.begin(unit, InMemory(named)).codec.format == "raw"
    assert CODEC.encode(unit, named)["m.weight"].shape == (0, 4)


class Changing:
    """A source whose second reading differs from the first."""

    def __init__(self, *readings: torch.Tensor) -> None:
        self._readings = list(readings)

    def read(self, spec: TensorSpec, start: int, stop: int) -> torch.Tensor:
        return self._readings.pop(0).flatten()[start:stop]


@pytest.mark.parametrize("other", [mixed(40, 60) * 64, mixed(40, 60).flip(0) * 1.5, from_exponents(np.full(2400, 3))])
def test_a_source_that_changes_between_the_passes_is_refused(other: torch.Tensor) -> None:
    unit, named = unit_of(mixed(40, 60))
    encoding = CODEC.begin(unit, Changing(named["m.weight"], other))
    with pytest.raises(CodecError, match=r"^m: the source changed"):
        list(encoding.chunks())


@pytest.mark.parametrize(("module", "table"), [(pack, "pair_table"), (unpack, "lookup_table")])
def test_a_wrong_code_does_not_pass_verification(module: Any, table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(module, table)

    def damaged(*book: np.ndarray) -> np.ndarray:
        return right(*book) ^ np.uint64(1)  # the last bit of each pair's code; the first exponent of each lookup

    monkeypatch.setattr(module, table, damaged)
    unit, named = unit_of(mixed(40, 60))
    with pytest.raises(CodecError, match=r"^m: .* did not come back"):
        CODEC.encode(unit, named)


def test_weights_are_checked_from_the_header() -> None:
    for spec in (
        TensorSpec("F32", (4, 4), "m.weight"),
        TensorSpec("BF16", (4,), "n.weight"),
        TensorSpec("BF16", (4, 4), "p"),
    ):
        with pytest.raises(PlanError, match=spec.name):
            CODEC.check(Unit("m", (spec,)))
    with pytest.raises(PlanError, match="finer"):
        CODEC.check(Unit("m", (TensorSpec("BF16", (1 << 16, 1 << 15), "m.weight"),)))


@pytest.mark.parametrize("make", [lambda: mixed(300, 400), lambda: from_exponents(CASES["every exponent"]())])
def test_sizes_are_bounded_from_the_header_and_close_by_a_sample(make: Callable[[], torch.Tensor]) -> None:
    tensor = make()
    unit, named = unit_of(tensor)
    stored = sum(part.nbytes for part in CODEC.encode(unit, named).values())
    assert stored <= CODEC.nbytes(unit)
    assert stored <= CODEC.sampled(unit, InMemory(named)) <= 1.1 * stored + 20 * 256


def test_a_window_on_which_the_official_kernel_would_not_end() -> None:
    luts = np.full((2, 256), 7, np.uint8)
    luts[1] = 0
    assert stalls(luts, 0, 0)
    luts[1, 7] = 8
    assert not stalls(luts, 0, 0)
    luts[0, 0xA5] = 9  # no length: only a window with this byte where a code starts stalls
    luts[1, 9] = 0
    for place in range(8):
        window = 0xA5 << (88 - 8 * place)
        assert stalls(luts, window, 0)
        assert not stalls(luts, window, 4)  # codes start within the bytes: 0x0A and 0x50
    assert not stalls(luts, 0xA5 << 16, 0)  # in the next window's bits
    book = make_book(np.bincount([1, 1, 2, 3, 5, 8, 13], minlength=256))
    assert not stalls(book.without_pointers().luts, 0, 0)


@pytest.mark.parametrize("batch", [1000, 1 << 21])
@pytest.mark.parametrize("kind", ["dense start", "dense end", "even", "whole blocks", "one block"])
def test_the_densest_block_is_that_of_the_stream(kind: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By where every code starts."""
    rng = np.random.default_rng(4)
    dense, thin = np.full(60_000, 118), rng.integers(100, 116, 40_000)
    exponents = {
        "dense start": np.concatenate([dense, thin]),
        "dense end": np.concatenate([thin, dense]),
        "even": rng.permutation(np.concatenate([dense, thin])),
        "whole blocks": np.repeat([118, 117], [BLOCK_BITS, BLOCK_BITS]),  # codes of one bit: two blocks to the last bit
        "one block": np.full(77, 118),
    }[kind]
    monkeypatch.setattr(encode, "BATCH", batch)
    unit, named = unit_of(from_exponents(exponents))
    found = encode.survey(unit, InMemory(named))
    book = make_book(found.counts)
    lengths = book.lengths.astype(np.int64)[exponents]
    starts = np.cumsum(lengths) - lengths
    assert encode.densest_block(unit, InMemory(named), found, book) == np.bincount(starts // BLOCK_BITS).max()


@pytest.mark.parametrize(("weights", "shortest"), [(MAX_BLOCK_WEIGHTS, 1), (MAX_BLOCK_WEIGHTS + 1, 2)])
def test_a_block_that_just_fits_the_kernel_keeps_the_official_book(weights: int, shortest: int) -> None:
    unit, named = unit_of(from_exponents(np.repeat([118, 117], [weights - 9, 9])))
    assert encode.choose_book(unit, InMemory(named), encode.survey(unit, InMemory(named))).shortest == shortest


@pytest.mark.parametrize("symbols", [1, 2, 3])
def test_books_of_two_bits_are_found_for_all_counts(symbols: int) -> None:
    """Two exponents, one of them rare, were looked at for ever: equal counts of 2 leave one with a single bit."""
    for few in product((1, 2, 3, 5, 9, 23_542), repeat=symbols):
        counts = np.zeros(256, np.int64)
        counts[100 + np.arange(symbols)] = few
        book = make_book(counts, at_least_two_bits=True)
        assert book.shortest >= 2
        assert set(np.flatnonzero(counts)) <= {code.symbol for code in book.codes}
