"""Sizes by component, expert and codec: the table that `plan` and `inspect` print."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bagel.layout import official_role
from bagel_compress.codecs.base import Codec
from bagel_compress.io.byte_size import size_text
from bagel_compress.io.tensor_spec import TensorSpec


@dataclass(frozen=True, slots=True)
class SizeGroup:
    """Sizes of the tensors of one component, expert and codec."""

    component: str
    expert: str
    codec: str
    tensors: int
    parameters: int
    source_bytes: int
    nbytes: int

    @property
    def bits(self) -> float:
        """Stored bits per parameter."""
        return 8 * self.nbytes / self.parameters

    def to_json(self) -> dict[str, Any]:
        fields = ("component", "expert", "codec", "tensors", "parameters", "source_bytes", "nbytes")
        return {name: getattr(self, name) for name in fields} | {"bits": round(self.bits, 4)}


def group_sizes(stored: Iterable[tuple[Codec, tuple[TensorSpec, ...], int]]) -> list[SizeGroup]:
    """Sums by component, expert and codec. A unit over several experts is split by its parameters."""
    sums: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0, 0, 0, 0])
    for codec, specs, nbytes in stored:
        numel = sum(s.numel for s in specs)
        for spec in specs:
            role = official_role(spec.name)
            row = sums[(role.component, role.expert, codec.format)]
            for i, value in enumerate((1, spec.numel, spec.nbytes, nbytes * spec.numel / numel)):
                row[i] += value
    return [SizeGroup(*key, int(n), int(p), int(s), round(b)) for key, (n, p, s, b) in sorted(sums.items())]


def sizes_table(groups: Sequence[SizeGroup], nbytes: int, bound: str = "") -> str:
    """Text table of groups; the last line is the total, whose bytes include the files' headers."""
    row = "{:<10} {:<7} {:<6} {:>7} {:>15} {:>15} {:>7}".format
    lines = [row("component", "expert", "codec", "tensors", "parameters", "bytes", "bits")]
    for g in groups:
        lines.append(
            row(g.component, g.expert, g.codec, g.tensors, f"{g.parameters:,}", f"{g.nbytes:,}", f"{g.bits:.3f}")
        )
    tensors, parameters = sum(g.tensors for g in groups), sum(g.parameters for g in groups)
    source = sum(g.source_bytes for g in groups)
    lines.append(row("total", "", "", tensors, f"{parameters:,}", f"{nbytes:,}", f"{8 * nbytes / parameters:.3f}"))
    share = f"{nbytes / source:.1%} of {size_text(source)}"
    lines.append(f"{bound}{size_text(nbytes)} ({nbytes / 2**30:.3f} GiB), {share}")
    return "\n".join(lines)
