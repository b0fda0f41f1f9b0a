"""The stored form of one ecq weight: constants, parts and their shapes. No numba, no torch.

The M weights of a matrix are one flat row of runs of RUN weights; the last may be shorter. Every weight is a symbol of
8 bits: 127 + (code >> low_bits), or ESCAPE. A run stands alone, so that any run can be decoded without the others:

    2 bytes        12 bits of the coder's first state, 4 bits of padding (0 to 7)
    low bits       `low_bits` planes of one bit per weight, lowest first, each padded to a byte
    symbol bits    after that padding, little-endian; the decoder ends in state 0 at a byte's end
    escapes        2 bytes each, last one first: the decoded weight itself as a bf16 word

So a decoder that goes through a run once knows where everything is: low bits from the front, escapes from the end.
The coder is table-based asymmetric numeral coding (tANS; J. Duda, arXiv 1311.2540) with 4096 states.
"""

from __future__ import annotations

from dataclasses import dataclass

from bagel_compress.io.tensor_spec import PartSpec

RUN = 2048  # weights per run: states, lengths and padding cost 35.5 bits a run, 0.017 bits a weight
STATE_BITS = 12
STATES = 1 << STATE_BITS  # what the frequencies of a book add up to
ESCAPE = 255  # the symbol of a weight that is stored as it is
CENTRE = 127  # the symbol of code 0
MAX_LOW_BITS = 4
HEADER_BYTES = 2  # of a run
ESCAPE_BYTES = 2
BOOK_HEADER = 3  # low bits, first symbol, frequency of ESCAPE; then the frequencies from the first symbol on
SLICE = 1 << 27  # weights decoded at a time at run time: 268 MB; the model's layers are below it, its head is not
MIN_BITS, MAX_BITS = 1.5, 8.5
# What a run is taken to cost beyond its symbols: header, length, and half a byte of padding less half a bit.
RUN_BITS = 8 * HEADER_BYTES + 16 + 3.5
SUFFIXES = ("stream", "run_bytes", "book", "step")
COLUMN_STEPS = "column_steps"


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of one weight's parts: weights, bytes of the stream, frequencies in the book, columns with own steps."""

    weights: int
    stream_bytes: int
    symbols: int
    columns: int = 0

    @property
    def runs(self) -> int:
        return -(-self.weights // RUN)

    def parts(self, name: str) -> dict[str, PartSpec]:
        """The stored tensors by full name."""
        parts = {
            f"{name}.stream": PartSpec("U8", (self.stream_bytes,)),
            f"{name}.run_bytes": PartSpec("U16", (self.runs,)),
            f"{name}.book": PartSpec("U16", (BOOK_HEADER + self.symbols,)),
            f"{name}.step": PartSpec("F32", (1,)),
        }
        if self.columns:
            parts[f"{name}.{COLUMN_STEPS}"] = PartSpec("BF16", (self.columns,))
        return parts

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts("").values())


def bound(weights: int, bits: float, columns: int = 0) -> Sizes:
    """The most that a weight may take at a rate: floor(weights * bits / 8) bytes in all.

    Matrices of less than about a hundred weights get more than that, so that few codes, or escapes, have room.
    """
    least = Sizes(weights, HEADER_BYTES * -(-weights // RUN), 1, columns)
    spare = max(min(ESCAPE_BYTES * weights, 32), int(weights * bits / 8) - least.nbytes)
    return Sizes(weights, least.stream_bytes + spare, 1, columns)
