"""One decoder layer over all rows of a calibration set: second moments of every linear's inputs, and the rows go on.

The layer is done in the order of its linears: q, k and v; o; gate and up; down. After the moments of one group are
known, its weights may be rounded at once, so that with `refit` the next group sees what the rounded ones give. Then the
rows exist twice, as the full model has them and as the rounded one has them; else once. Weights are read for the group
that needs them and dropped after it: no whole layer is ever in memory. The MLP's inner rows, its largest product, are
computed once and kept for one expert at a time, in the rows' own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from bagel.layers import attention, rope_table
from bagel.loading import put, unfilled
from bagel.mot import Expert
from bagel_compress.calibrate.moments import Moments, block_width
from bagel_compress.errors import CalibrationError

if TYPE_CHECKING:
    from bagel.config import BagelConfig
    from bagel_compress.calibrate.layout import Layout

CHUNK = 1024  # rows through a linear at a time: at 7B the MLP's products of a chunk take 0.23 GB in fp32
QKV, ATTENDED, GATED, DOWN = ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)

Weight = Callable[[str], Tensor]  # path of a parameter, such as layers.3.gen.q_proj.weight -> its value, bf16


class Rounder(Protocol):
    """What rounds the weights of a layer once their moments are known."""

    refit: bool

    def wants(self, path: str) -> bool:
        """Whether the weight with this path is rounded by moments."""

    def take(self, paths: Sequence[str], moments: Moments) -> Mapping[str, Tensor]:
        """Rounds the weights with these paths and gives their decoded values; these see the same inputs."""


@dataclass(slots=True)
class Stream:
    """Rows [total, D] of one version of the model, between two layers; and the weights in which it differs here."""

    rows: Tensor
    rounded: bool = False
    coded: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Part:
    """A range of rows that one expert works on in one way."""

    expert: str
    start: int
    stop: int
    in_fp32: bool


class LayerRun:
    """Runs layers one after the other over the same rows."""

    def __init__(self, layout: Layout, config: BagelConfig, device: torch.device, dtype: torch.dtype) -> None:
        """`dtype`: of the computation; the moments are fp32 whatever it is."""
        self.layout, self.config, self.device, self.dtype = layout, config, device, dtype
        llm = config.llm
        self._rope = rope_table(layout.positions().to(device), llm.head_dim, llm.rope_theta, dtype)
        self._read = layout.read_rows().to(device)
        with unfilled():
            self._experts = {(name, rounded): Expert(llm) for name in ("und", "gen") for rounded in (False, True)}
        ranges = (("und", 0, layout.narrow, False), ("und", layout.narrow, layout.und, True),
                  ("gen", layout.und, layout.total, True))  # fmt: skip
        self._parts = [_Part(*given) for given in ranges if given[2] > given[1]]

    @torch.no_grad()
    def run(self, layer: int, weight: Weight, streams: Sequence[Stream], rounder: Rounder | None) -> None:
        """Takes all streams through a layer, in place. `streams`: the full model's and, with refit, the rounded one's,
        with those of its weights in `coded` that are coded already; they are forgotten after the layer.

        Raises CalibrationError if rows are not finite, or what `rounder.take` raises.
        """
        last = layer == self.config.llm.num_layers - 1
        step = _Step(self, f"layers.{layer}", weight, list(streams), rounder, last)
        for stream in streams:
            if not bool(torch.isfinite(stream.rows).all()):
                raise CalibrationError(
                    f"the rows that enter layer {layer} hold NaN or Inf; the checkpoint is damaged, verify it."
                )
        for name in self.experts:
            step.collect(name, QKV, self._normed("input_layernorm"), split_query=True)
        for stream in streams:
            self._attend(step, stream)
        for name in self.experts:
            step.collect(name, ATTENDED, step.attended_rows)
            for stream in streams:
                self._add(step, name, stream, "o_proj", step.attended_rows)
        step.attended.clear()
        for name in self.experts:
            step.collect(name, GATED, self._normed("post_attention_layernorm"))
            for stream in streams:
                self._gate(step, name, stream)
            step.collect(name, DOWN, step.gated_rows)
            for stream in streams:
                self._add(step, name, stream, "down_proj", step.gated_rows)
            step.gated.clear()
        for stream in streams:
            stream.coded.clear()

    def parts(self, expert: str) -> list[_Part]:
        return [part for part in self._parts if part.expert == expert]

    def chunks(self, expert: str) -> Iterator[slice]:
        """Rows of an expert, some at a time."""
        for part in self.parts(expert):
            for start in range(part.start, part.stop, CHUNK):
                yield slice(start, min(start + CHUNK, part.stop))

    @property
    def experts(self) -> list[str]:
        """Experts that have rows."""
        return [name for name in ("und", "gen") if self.parts(name)]

    def module(self, expert: str, rounded: bool) -> Expert:
        """An expert without weights; each version of the model has its own."""
        return self._experts[expert, rounded]

    def read_mask(self, rows: slice) -> Tensor:
        return self._read[rows]

    def _normed(self, norm: str) -> Inputs:
        def inputs(expert: Expert, stream: Stream, rows: slice) -> Tensor:
            return expert.get_submodule(norm)(stream.rows[rows].to(self.dtype))  # type: ignore[no-any-return]

        return inputs

    def _gate(self, step: _Step, name: str, stream: Stream) -> None:
        """Inner rows of the MLP, [rows of the expert, F] in `step.gated`."""
        parts = self.parts(name)
        first, last = parts[0].start, parts[-1].stop
        normed = self._normed("post_attention_layernorm")
        with step.loaded(name, stream, GATED) as expert:
            width = expert.gate_proj.out_features
            found = torch.empty(last - first, width, device=self.device, dtype=stream.rows.dtype)
            for rows in self.chunks(name):
                x_TD = normed(expert, stream, rows)
                found[rows.start - first : rows.stop - first] = nn.functional.silu(
                    expert.gate_proj(x_TD)
                ) * expert.up_proj(x_TD)
        step.gated[stream.rounded] = first, found

    def _add(self, step: _Step, name: str, stream: Stream, linear: str, inputs: Inputs) -> None:
        """rows += linear(inputs), of one expert."""
        with step.loaded(name, stream, (linear,)) as expert:
            for rows in self.chunks(name):
                found = expert.get_submodule(linear)(inputs(expert, stream, rows))
                stream.rows[rows] = (stream.rows[rows].to(self.dtype) + found).to(stream.rows.dtype)

    def _attend(self, step: _Step, stream: Stream) -> None:
        """Attention of every pass over its trunk and itself; leaves [total, H, E] in `step.attended`."""
        llm, total = self.config.llm, self.layout.total
        q = torch.empty(total, llm.num_heads, llm.head_dim, device=self.device, dtype=self.dtype)
        k = torch.empty(total, llm.num_kv_heads, llm.head_dim, device=self.device, dtype=self.dtype)
        v = torch.empty_like(k)
        for name in self.experts:
            with step.loaded(name, stream, QKV) as expert:
                for part in self.parts(name):
                    for start in range(part.start, part.stop, CHUNK):
                        rows = slice(start, min(start + CHUNK, part.stop))
                        x_TD = self._normed("input_layernorm")(expert, stream, rows)
                        rope = self._rope[0][rows], self._rope[1][rows]
                        q[rows] = expert.query(x_TD, rope, part.in_fp32)
                        k[rows], v[rows] = expert.key_value(x_TD, rope, part.in_fp32)
        for sequence in self.layout.sequences:
            trunk = [p.rows.to(self.device) for p in sequence if p.on_trunk]
            for p in sequence:
                own = p.rows.to(self.device)
                keys = torch.cat([*trunk[: p.sees], own])
                q[own] = attention([q[own]], [k[keys]], [v[keys]], p.causal)
        step.attended[stream.rounded] = q


Inputs = Callable[[Expert, Stream, slice], Tensor]


@dataclass(slots=True)
class _Step:
    """One layer on its way."""

    owner: LayerRun
    prefix: str
    weight: Weight
    streams: list[Stream]
    rounder: Rounder | None
    last: bool
    attended: dict[bool, Tensor] = field(default_factory=dict)  # [total, H, E] of each version of the model
    gated: dict[bool, tuple[int, Tensor]] = field(default_factory=dict)  # of one expert: its first row, [its rows, F]

    def attended_rows(self, expert: Expert, stream: Stream, rows: slice) -> Tensor:
        """Inputs of o_proj."""
        return self.attended[stream.rounded][rows].flatten(1)

    def gated_rows(self, expert: Expert, stream: Stream, rows: slice) -> Tensor:
        """Inputs of down_proj."""
        first, found = self.gated[stream.rounded]
        return found[rows.start - first : rows.stop - first].to(self.owner.dtype)

    def collect(self, expert: str, names: tuple[str, ...], inputs: Inputs, split_query: bool = False) -> None:
        """Moments of the inputs of an expert's linears that see the same ones, then their rounding.

        In the last layer only rows whose result is read count, except for keys and values (`split_query`).
        """
        if self.rounder is None:
            return
        groups: tuple[tuple[tuple[str, ...], bool], ...] = ((names, self.last),)
        if split_query and self.last:
            groups = ((("q_proj",), True), (("k_proj", "v_proj"), False))
        for group, masked in groups:
            paths = [f"{self.prefix}.{expert}.{name}.weight" for name in group]
            if wanted := [path for path in paths if self.rounder.wants(path)]:
                decoded = self.rounder.take(wanted, self._moments(expert, group[0], inputs, masked))
                if self.rounder.refit:
                    self.streams[-1].coded.update(decoded)

    def _moments(self, expert: str, name: str, inputs: Inputs, masked: bool) -> Moments:
        assert self.rounder is not None
        linear = self.owner.module(expert, False).get_submodule(name)
        assert isinstance(linear, nn.Linear)
        width = linear.in_features
        moments = Moments(width, block=block_width(width), cross=self.rounder.refit, device=self.owner.device)
        with ExitStack() as stack:
            modules = [stack.enter_context(self.loaded(expert, stream, ())) for stream in self.streams]
            for rows in self.owner.chunks(expert):
                found = [inputs(module, stream, rows) for module, stream in zip(modules, self.streams, strict=True)]
                if masked:
                    found = [values[self.owner.read_mask(rows)] for values in found]
                moments.add(found[-1], found[0] if self.rounder.refit else None)
        return moments

    @contextmanager
    def loaded(self, expert: str, stream: Stream, names: Sequence[str]) -> Iterator[Expert]:
        """The expert with norms and these linears in place, as the stream has them."""
        module = self.owner.module(expert, stream.rounded)
        wanted = [n for n, _ in module.named_parameters() if "norm" in n or n.split(".")[0] in names]
        empty = {name: module.get_parameter(name) for name in wanted}
        for name in wanted:
            path = f"{self.prefix}.{expert}.{name}"
            value = stream.coded[path] if path in stream.coded else self.weight(path)
            value = value.to(self.owner.device, self.owner.dtype)
            put(module, name, nn.Parameter(value, requires_grad=False))
        yield module
        for name, parameter in empty.items():
            put(module, name, parameter)
