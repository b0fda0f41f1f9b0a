"""Encodings of a build with calibrated rounding, made layer by layer while the calibration set is run.

A build requests the encodings of one decoder layer after the other. The rows of the calibration set are run through a
layer (calibrate/layer_run.py) while its weights are rounded. A resumed build runs finished layers again without
encoding: the rows are computed again, not stored, so that it needs nothing but its finished shards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from bagel.layout import official_role
from bagel.loading import parameter_path, read_config_files
from bagel.text import TextCodec
from bagel.threads import one_thread, too_small_to_share
from bagel_compress.calibrate.calibration_set import CalibrationSet
from bagel_compress.calibrate.first_rows import first_rows
from bagel_compress.calibrate.layer_run import LayerRun, Stream
from bagel_compress.calibrate.layout import lay_out
from bagel_compress.calibrate.rounding import round_unit
from bagel_compress.codecs.base import TORCH_DTYPES, Encoding, Unit
from bagel_compress.codecs.calibrated import CalibratedCodec, Gptq
from bagel_compress.codecs.grid import Packed
from bagel_compress.io.tensor_spec import TensorSpec

if TYPE_CHECKING:
    from bagel.config import BagelConfig
    from bagel_compress.build.manifest import UnitEntry
    from bagel_compress.build.plan import Placement, Plan
    from bagel_compress.calibrate.moments import Moments
    from bagel_compress.source.checkpoint import Checkpoint

Finished = Callable[[str], Mapping[str, "UnitEntry"] | None]  # shard -> entries of its units, if it is finished


class CalibratedEncodings:
    """Encodings of the decoder layers of a plan that has a calibration set."""

    def __init__(self, plan: Plan, checkpoint: Checkpoint, out: Path, finished: Finished, device: str) -> None:
        """`finished` gives the finished shards of an earlier run in `out`; `refit` reads rounded weights from them."""
        assert plan.calibration is not None
        self._plan, self._checkpoint, self._out, self._finished = plan, checkpoint, out, finished
        self._calibration: CalibrationSet = plan.calibration
        self._device = torch.device(device)
        self._dtype = torch.float32 if self._device.type == "cpu" else torch.bfloat16
        self._specs = {parameter_path(spec.name): spec for spec in checkpoint.specs}
        self._refit = any(_refits(p) for p in plan.placements)
        self._layers = {layer: shard for shard in plan.shards if (layer := _layer(plan.in_shard(shard))) is not None}
        self._last = max(
            layer for layer, shard in self._layers.items() if any(p.calibrated for p in plan.in_shard(shard))
        )
        self._next = 0
        self._run: LayerRun | None = None
        self._streams: list[Stream] = []

    def of_shard(self, shard: str) -> dict[str, Encoding]:
        """The encodings of a shard's calibrated units by name, with `refit` of all its compressed units; else empty.

        Call it in the plan's order of shards; finished ones may be left out.
        """
        layer = next((layer for layer, name in self._layers.items() if name == shard), None)
        if layer is None or layer > self._last:
            return {}
        rounder = _Rounder(self._plan.in_shard(shard), self._checkpoint, self._refit)
        with one_thread() if too_small_to_share(self._model[0].llm) else nullcontext():
            while self._next < layer:
                self._pass_by(self._next)
            if self._refit:
                self._streams_of()[-1].coded.update(rounder.uncalibrated())
            self._through(layer, rounder)
        if layer == self._last:
            self._run, self._streams = None, []
        return rounder.encodings

    def _pass_by(self, layer: int) -> None:
        """Runs the rows through a layer that is encoded already."""
        if self._refit:
            shard = self._layers[layer]
            entries = self._finished(shard)
            assert entries is not None, f"{shard} is coded before the layers after it"
            self._streams_of()[-1].coded.update(_decoded(self._out / shard, entries))
        self._through(layer, None)

    def _through(self, layer: int, rounder: _Rounder | None) -> None:
        streams = self._streams_of()
        assert self._run is not None
        self._run.run(layer, self._weight, streams, rounder)
        self._next = layer + 1

    @cached_property
    def _model(self) -> tuple[BagelConfig, TextCodec]:
        return model_config(self._checkpoint)

    def _streams_of(self) -> list[Stream]:
        """The rows at the input of the next layer."""
        if self._run is None:
            config, text = self._model
            layout = lay_out(self._calibration)
            specs = {spec.name: spec for spec in self._checkpoint.specs}
            wrap = (text.image_start, text.image_end)
            rows = first_rows(
                self._calibration, layout, config, specs, self._checkpoint, wrap, self._device, self._dtype
            ).to(self._device)
            self._streams = [Stream(rows)] + ([Stream(rows.clone(), rounded=True)] if self._refit else [])
            self._run = LayerRun(layout, config, self._device, self._dtype)
        return self._streams

    def _weight(self, path: str) -> torch.Tensor:
        spec = self._specs[path]
        return self._checkpoint.read(spec, 0, spec.numel).reshape(spec.shape)


class _Rounder:
    """Rounds the weights of one layer and keeps their encodings."""

    def __init__(self, placements: Sequence[Placement], checkpoint: Checkpoint, refit: bool) -> None:
        self.refit = refit
        self.encodings: dict[str, Encoding] = {}
        self._checkpoint = checkpoint
        self._placements = {parameter_path(p.unit.specs[0].name): p for p in placements if p.calibrated}
        self._others = [p for p in placements if not p.calibrated and not p.codec.lossless]

    def wants(self, path: str) -> bool:
        return path in self._placements

    def take(self, paths: Sequence[str], moments: Moments) -> dict[str, torch.Tensor]:
        decoded = {}
        for path in paths:
            placement = self._placements[path]
            codec, unit = placement.codec, placement.unit
            assert isinstance(codec, CalibratedCodec)
            encoding = round_unit(codec, unit, self._checkpoint, moments)
            if not isinstance(encoding, Packed):
                encoding = _alone(codec, placement, self._checkpoint)
            self.encodings[unit.name] = encoding
            if self.refit:
                decoded[path] = _values(placement, encoding)
        return decoded

    def uncalibrated(self) -> dict[str, torch.Tensor]:
        """Encodes the layer's other compressed weights and returns their decoded values by path."""
        found: dict[str, torch.Tensor] = {}
        for placement in self._others:
            encoding = _packed(placement.codec.begin(placement.unit, self._checkpoint))
            self.encodings[placement.unit.name] = encoding
            tensors = placement.codec.decode(placement.unit, encoding.stored)
            found |= {parameter_path(name): value for name, value in tensors.items()}
        return found


def _alone(codec: CalibratedCodec, placement: Placement, source: Checkpoint) -> Encoding:
    """The encoding of a weight without a grid in the format: values are rounded to nearest, and the entry says so."""
    encoding = _packed(codec.model_copy(update={"rounding": "nearest"}).begin(placement.unit, source))
    encoding.reason = "its width is no multiple of the format's block, so that each weight is rounded alone"
    return encoding


def _packed(encoding: Encoding) -> Packed:
    """The same encoding with its parts in memory."""
    stored = {n: torch.empty(part.shape, dtype=TORCH_DTYPES[part.dtype]()) for n, part in encoding.parts.items()}
    raw = {name: tensor.view(-1).view(torch.uint8).numpy() for name, tensor in stored.items() if tensor.numel()}
    for chunk in encoding.chunks():
        if chunk.data.size:
            raw[chunk.part][chunk.start : chunk.start + chunk.data.nbytes] = chunk.data
    return Packed(encoding.codec, encoding.parts, encoding.reason, encoding.quality, stored=stored)


def _values(placement: Placement, encoding: Encoding) -> torch.Tensor:
    assert isinstance(encoding, Packed)
    return encoding.codec.decode(placement.unit, encoding.stored)[placement.unit.specs[0].name]


def _decoded(shard: Path, entries: Mapping[str, UnitEntry]) -> dict[str, torch.Tensor]:
    """Decoded values, by path, of the compressed units of a finished shard."""
    found: dict[str, torch.Tensor] = {}
    with safe_open(str(shard), framework="pt") as handle:
        for name, entry in entries.items():
            if entry.codec.lossless:
                continue
            unit = Unit(name, tuple(TensorSpec(t.dtype, t.shape, n) for n, t in entry.tensors.items()))
            tensors = entry.codec.decode(unit, {part: handle.get_tensor(part) for part in entry.parts})
            found |= {parameter_path(tensor): value for tensor, value in tensors.items()}
    return found


def _layer(placements: Sequence[Placement]) -> int | None:
    """The decoder layer that a shard holds."""
    roles = [official_role(spec.name) for p in placements for spec in p.unit.specs]
    layers = {role.layer for role in roles if role.component == "llm"}
    return layers.pop() if len(layers) == 1 and all(role.component == "llm" for role in roles) else None


def _refits(placement: Placement) -> bool:
    codec = placement.codec
    return isinstance(codec, CalibratedCodec) and isinstance(codec.rounding, Gptq) and codec.rounding.refit


def model_config(checkpoint: Checkpoint) -> tuple[BagelConfig, TextCodec]:
    """Configuration and tokenizer of a checkpoint, wherever its files lie."""
    vae = {name: tensor.shape for name, tensor in checkpoint.vae.tensors.items()}
    config, _ = read_config_files(checkpoint.files, checkpoint.shapes, vae)
    return config, TextCodec.from_files(checkpoint.files, checkpoint.files["llm_config.json"].parent)
