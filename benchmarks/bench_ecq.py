"""ecq: encoding and decoding speed beside its peers, and its stream as a lossless format, same tensor, same run.

    python benchmarks/bench_ecq.py [--rows 18944] [--columns 3584] [--bits 2.5 4.13 6] [--repeats 5] [--clock wall]

Tensor, clocks and rules are those of bench_df11.py: an MLP weight of BAGEL-7B-MoT with trained-like statistics, warm
buffers, medians, MB of bf16. "encode" counts, searches the step, writes, decodes and compares; no peer compares.

    zipnn      codes ecq's 8-bit symbols at 4.13 bits, as bytes of its 8-bit type: the entropy coder alone, no search
    entropack  the one other format of any rate, by its eager path (its kernels need a GPU), on the first 128 rows, once
    dfloat11   lossless: its compressor, once. DF11 and "exponents" are this package's
    exponents  decoding of DF11's exponents from ecq's stream, joined with signs and mantissas: a lossless format that
               is not offered

Ends in one JSON line. Peers that are not installed are left out and named: pip install zipnn dfloat11 dahuffman, and
pip install --no-deps entropack.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from bench_df11 import NAME, Bench, Work, cpu, mixed, official_rate
from numba import njit

from bagel_compress.codecs.base import InMemory, Unit
from bagel_compress.codecs.df11.unpack import join
from bagel_compress.codecs.ecq import Ecq, pack, unpack
from bagel_compress.codecs.ecq.book import fit
from bagel_compress.codecs.ecq.device import StoredWeight
from bagel_compress.codecs.ecq.encode import WORST_RUN, Workspace, survey
from bagel_compress.codecs.ecq.layout import ESCAPE, RUN, Sizes
from bagel_compress.codecs.ecq.step import tables_of
from bagel_compress.codecs.kernels.addresses import address_of
from bagel_compress.codecs.kernels.threads import split
from bagel_compress.io.tensor_spec import TensorSpec

WEIGHT = f"{NAME}.weight"
PEER_BITS = 4.13
SLICE_ROWS = 128  # that entropack gets: it codes about 1 MB/s
PEERS = ("zipnn", "entropack", "dfloat11")


def main() -> None:
    args = _arguments()
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    bench = Bench(mixed(args.rows, args.columns), args.repeats, clock)
    works, rates = ecq_works(bench, args.bits)
    lossless, rates["exponents"] = exponent_works(bench)
    zipnn, bits = zipnn_works(bench)
    if zipnn:
        rates["zipnn"] = bits
    rows = bench.rates([*works, *lossless, *_df11(bench), *zipnn])
    if importlib.util.find_spec("dfloat11"):
        rows["dfloat11 encode"], _ = official_rate(bench)
    errors: dict[str, float] = {}
    if importlib.util.find_spec("entropack"):
        rows["entropack encode"], rows["entropack decode"], rates["entropack"], errors = entropack(bench)
    report(args, rows, rates, errors)


def _unit(weights: torch.Tensor) -> Unit:
    return Unit(WEIGHT, (TensorSpec("BF16", tuple(weights.shape), WEIGHT),))


def ecq_works(bench: Bench, asked: list[float]) -> tuple[list[Work], dict[str, float]]:
    """Encoding and decoding at every rate on one and two threads; and the bits that were stored."""
    works, rates, unit = [], {}, _unit(bench.weights)
    for bits in asked:
        codec = Ecq(bits=bits)
        parts = codec.encode(unit, {WEIGHT: bench.weights})
        rates[str(bits)] = 8 * sum(part.nbytes for part in parts.values()) / bench.weights.numel()
        [whole] = StoredWeight(unit, parts).slices(bench.weights.numel())
        for threads in (1, 2):
            encode = partial(_encode, codec, unit, InMemory({WEIGHT: bench.weights}))
            works.append(Work(f"encode {bits} {threads}t", encode, threads=threads))
            works.append(Work(f"decode {bits} {threads}t", partial(whole.decode_into, bench.out), threads=threads))
    return works, rates


def _encode(codec: Ecq, unit: Unit, source: InMemory) -> None:
    for _ in codec.begin(unit, source).chunks():
        pass


def _df11(bench: Bench) -> list[Work]:
    works = [work for threads in (1, 2) for work in bench.works(threads)]
    return [Work(f"df11 {work.name}", work.run, threads=work.threads) for work in works]


def exponent_works(bench: Bench) -> tuple[list[Work], float]:
    """Decoding the exponents from runs of tANS on one and two threads; and the bits of a weight, all included."""
    words = bench.words.view(np.uint16)
    exponents = ((words >> 7) & 255).astype(np.uint8)
    rest = (((words >> 8) & 128) | (words & 127)).astype(np.uint8)
    book, _ = fit(np.bincount(exponents, minlength=256).astype(np.int64), 0)
    symbols = np.concatenate([exponents, np.zeros(8, np.uint8)])
    symbols[book.frequencies[symbols] == 0] = ESCAPE
    sizes, space = np.empty(-(-words.size // RUN), np.int64), Workspace()
    stream = np.empty(sizes.size * WORST_RUN // 4 + unpack.READ_SLACK, np.uint8)
    form, tables, scratch = (0, book.escaping), pack.coder(book.frequencies), (space.pieces, space.joined, stream)
    size = pack.pack(symbols[: words.size], symbols, words, *form, *tables, *scratch, sizes)
    lookup, offsets = unpack.decoder(book.frequencies), np.concatenate([[0], np.cumsum(sizes)])
    out, whole = np.zeros_like(words), words.size // RUN // 4 * 4

    def decode() -> None:
        split(lambda a, b: _exponents((a, b), stream, offsets, lookup, rest, out), whole, 64)

    decode()
    if not np.array_equal(out[: whole * RUN], words[: whole * RUN]):
        raise SystemExit("exponents did not come back")
    bits = 8 + 8 * Sizes(words.size, size, book.symbols).nbytes / words.size
    return [Work(f"exponents decode {threads}t", decode, threads=threads) for threads in (1, 2)], bits


@njit(nogil=True)
def _exponents(  # type: ignore[no-untyped-def]
    runs, stream, offsets, table, rest, out
):
    """Runs [first, last), multiples of four, to uint16 `out` of the whole weight."""
    symbols = np.empty((4, RUN), np.uint8)
    for run in range(runs[0], runs[1], 4):
        unpack._four_runs(
            address_of(stream), offsets[run], offsets[run + 1], offsets[run + 2], offsets[run + 3], 0,
            address_of(table), address_of(symbols),
        )  # fmt: skip
        part = slice(run * RUN, (run + 4) * RUN)
        join(symbols.reshape(4 * RUN), rest[part], out[part])
        for k in range(4):
            if unpack.count_escapes(address_of(symbols[k]), RUN):
                end = address_of(stream) + offsets[run + k + 1]
                unpack._put_escapes(address_of(symbols[k]), RUN, end, address_of(out) + 2 * (run + k) * RUN)


def zipnn_works(bench: Bench) -> tuple[list[Work], float]:
    """Its coder on the symbols that ecq codes, and its bits a weight."""
    if importlib.util.find_spec("zipnn") is None:
        return [], float("nan")
    from zipnn import ZipNN

    codec, spec = Ecq(bits=PEER_BITS), _unit(bench.weights).specs[0]
    search, _ = survey(spec, InMemory({WEIGHT: bench.weights}), codec)
    symbols = tables_of(search.find(PEER_BITS * spec.numel), search).symbols[bench.words.view(np.uint16)]
    works, data = [], symbols.tobytes()
    fresh = bytearray(data)

    def refresh() -> None:  # compress() changes its input in place
        fresh[:] = data

    for threads in (1, 2):
        coder = ZipNN(bytearray_dtype="float8_e4m3fn", input_format="byte", threads=threads)
        refresh()
        packed = coder.compress(fresh)
        if coder.decompress(packed) != data:
            raise SystemExit("zipnn did not give the codes back; its figures would mean nothing")
        works.append(Work(f"zipnn encode {threads}t", partial(coder.compress, fresh), refresh))
        works.append(Work(f"zipnn decode {threads}t", partial(coder.decompress, packed)))
    return works, 8 * len(packed) / spec.numel


def entropack(bench: Bench) -> tuple[float, float, float, dict[str, float]]:
    """bf16 bytes per second of encoding and decoding, bits a weight, and relative errors of both on the same rows."""
    import entropack as peer

    weights = bench.weights[:SLICE_ROWS].clone()
    config = peer.EntroPackLossyConfig(target_bpp=PEER_BITS, execution_backend="eager")
    compressed, encoding = _timed(bench, lambda: peer.compress(weights, config))
    restored, decoding = _timed(bench, lambda: peer.decompress(compressed, config))
    unit, codec = _unit(weights), Ecq(bits=float(min(8.5, compressed.actual_bpp)))
    ours = codec.decode(unit, codec.encode(unit, {WEIGHT: weights}))[WEIGHT]
    errors = {"entropack": _error(weights, restored), "ecq": _error(weights, ours)}
    return 2 * weights.numel() / encoding, 2 * weights.numel() / decoding, float(compressed.actual_bpp), errors


def _timed(bench: Bench, work: Callable[[], Any]) -> tuple[Any, float]:
    start = bench.clock()
    result = work()
    return result, bench.clock() - start


def _error(weights: torch.Tensor, restored: torch.Tensor) -> float:
    return float((restored.float() - weights.float()).norm() / weights.float().norm())


def report(args: argparse.Namespace, rows: dict[str, float], rates: dict[str, float], errors: dict[str, float]) -> None:
    missing = [peer for peer in PEERS if importlib.util.find_spec(peer) is None]
    print(f"{args.rows} x {args.columns} bf16, {cpu()}, {args.clock} time")
    for name, rate in rows.items():
        print(f"{name:24s} {rate / 1e6:10.1f} MB/s")
    print("stored bits:", ", ".join(f"{name} {bits:.4f}" for name, bits in rates.items()))
    if errors:
        pair = f"entropack {errors['entropack']:.4f}, ecq {errors['ecq']:.4f}"
        print(f"relative error of the first {SLICE_ROWS} rows at entropack's rate: {pair}")
    print(f"not installed: {', '.join(missing) or 'none'}")
    figures = {name: round(rate / 1e6, 1) for name, rate in rows.items()}
    bits = {name: round(value, 4) for name, value in rates.items()}
    line = {"bench": "ecq", "cpu": cpu(), "clock": args.clock, "stored_bits": bits, "mb_per_s": figures}
    print(json.dumps({**line, "errors": {k: round(v, 4) for k, v in errors.items()}, "missing": missing}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=18944)
    parser.add_argument("--columns", type=int, default=3584)
    parser.add_argument("--bits", type=float, nargs="+", default=[2.5, 4.13, 6.0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    return parser.parse_args()


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
