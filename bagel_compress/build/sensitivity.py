"""Sensitivity: the effect of compressing one group of weights in one format on velocities and on texts.

A group is the weights of one layer and expert that have the same inputs: q, k and v; o; gate and up; down. The rows of
a calibration set are run through the full-precision layers. At each layer, every group is compressed alone in every
format, and the rows are run through the remaining layers; the changes of velocities and of next-token distributions are
measured. This takes as much time as (groups x formats) passes of half the model: seconds for BAGEL-nano; use a GPU for
the released size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from bagel.layers import RMSNorm
from bagel.loading import parameter_path
from bagel_compress.build.calibrated import model_config
from bagel_compress.calibrate.first_rows import first_rows
from bagel_compress.calibrate.layer_run import ATTENDED, DOWN, GATED, QKV, LayerRun, Stream
from bagel_compress.calibrate.layout import lay_out
from bagel_compress.calibrate.rounding import round_unit
from bagel_compress.codecs.base import Codec, Unit
from bagel_compress.codecs.calibrated import CalibratedCodec
from bagel_compress.codecs.grid import Packed

if TYPE_CHECKING:
    from bagel_compress.calibrate.calibration_set import CalibrationSet
    from bagel_compress.calibrate.moments import Moments
    from bagel_compress.source.checkpoint import Checkpoint

GROUPS = {"qkv": QKV, "o": ATTENDED, "gate_up": GATED, "down": DOWN}
Progress = Callable[[str], None]
ROWS = 2048  # rows of the set to measure, approximately; groups differ far more than samples of this size


@dataclass(frozen=True, slots=True, order=True)
class Group:
    """A group of weights that get one format."""

    layer: int
    expert: str
    name: str  # of GROUPS

    @property
    def paths(self) -> tuple[str, ...]:
        """Parameter paths of its weights."""
        return tuple(f"layers.{self.layer}.{self.expert}.{linear}.weight" for linear in GROUPS[self.name])


@dataclass(frozen=True, slots=True)
class Effect:
    """The effect of one group in one format."""

    velocity: float  # relative squared error of the velocities
    kl: float  # mean KL divergence of next-token distributions, nats
    nbytes: int


@torch.no_grad()
def sensitivities(
    checkpoint: Checkpoint,
    calibration: CalibrationSet,
    codecs: Sequence[Codec],
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[Group, tuple[Effect, ...]]:
    """Group -> the effects of the codecs, in their order. Raises CodecError, CalibrationError, CheckpointError."""
    measure = _Measure(checkpoint, calibration, codecs, torch.device(device))
    found: dict[Group, tuple[Effect, ...]] = {}
    for layer in range(measure.layers):
        found |= measure.layer(layer)
        if progress:
            progress(f"layer {layer + 1} of {measure.layers} measured")
    return found


class _Measure:
    """The rows of the full model at the input of the next layer."""

    def __init__(
        self, checkpoint: Checkpoint, calibration: CalibrationSet, codecs: Sequence[Codec], device: torch.device
    ) -> None:
        self._checkpoint, self._codecs, self._device = checkpoint, codecs, device
        self._dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self._specs = {parameter_path(spec.name): spec for spec in checkpoint.specs}
        self._config, text = model_config(checkpoint)
        self.layers = self._config.llm.num_layers
        calibration = _thinned(calibration)
        layout = lay_out(calibration)
        specs = {spec.name: spec for spec in checkpoint.specs}
        wrap = (text.image_start, text.image_end)
        rows = first_rows(
            calibration, layout, self._config, specs, checkpoint, wrap, device, self._dtype, keep=torch.float32
        )
        self._run = LayerRun(layout, self._config, device, self._dtype)
        self._read, self._und = layout.read_rows().to(device), layout.und
        self._rows = rows.to(device)
        self._reference = self._outputs(self._through(self._rows.clone(), 0, {}))

    def layer(self, layer: int) -> dict[Group, tuple[Effect, ...]]:
        """The effects of a layer's groups; advances the rows to the next layer."""
        entering = self._rows.clone()
        rounder = _Candidates(self._checkpoint, self._specs, self._codecs)
        self._run.run(layer, self._weight, [Stream(self._rows)], rounder)
        found = {}
        for expert in self._run.experts:
            for name in GROUPS:
                group = Group(layer, expert, name)
                found[group] = tuple(
                    self._effect(entering, layer, {path: rounder.values[path][i] for path in group.paths}, nbytes)
                    for i, nbytes in enumerate(self._sizes(group))
                )
        return found

    def _sizes(self, group: Group) -> list[int]:
        units = [Unit(self._specs[path].name, (self._specs[path],)) for path in group.paths]
        return [sum(codec.nbytes(unit) for unit in units) for codec in self._codecs]

    def _effect(self, entering: Tensor, layer: int, coded: Mapping[str, Tensor], nbytes: int) -> Effect:
        velocity, logits = self._outputs(self._through(entering.clone(), layer, coded))
        full_velocity, full_logits = self._reference
        moved = (velocity - full_velocity).double().square().sum() / full_velocity.double().square().sum().clamp(1e-30)
        kl = 0.0
        if len(logits):
            full, found = full_logits.double().log_softmax(-1), logits.double().log_softmax(-1)
            kl = float((full.exp() * (full - found)).sum(-1).mean())
        return Effect(float(moved), max(kl, 0.0), nbytes)

    def _through(self, rows: Tensor, layer: int, coded: Mapping[str, Tensor]) -> Tensor:
        """The rows after the last layer, with the weights `coded` in `layer`; all others are the checkpoint's."""
        stream = Stream(rows, rounded=True)
        for index in range(layer, self.layers):
            if index == layer:
                stream.coded.update(coded)
            self._run.run(index, self._weight, [stream], None)
        return stream.rows

    def _outputs(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Velocities of the noised latents and logits of the decoded texts."""
        read = self._read
        gen, und = rows[self._und :][read[self._und :]], rows[: self._und][read[: self._und]]
        velocity = functional.linear(self._normed("norm_gen", gen), self._held("llm2vae.weight"))
        return velocity + self._held("llm2vae.bias"), functional.linear(
            self._normed("norm_und", und), self._held("lm_head.weight")
        )

    def _normed(self, name: str, rows: Tensor) -> Tensor:
        norm = RMSNorm(self._config.llm.hidden_size, self._config.llm.rms_norm_eps)
        norm.weight = torch.nn.Parameter(self._held(f"{name}.weight"), requires_grad=False)
        return norm(rows.to(self._dtype))  # type: ignore[no-any-return]

    def _held(self, path: str) -> Tensor:
        return self._weight(path).to(self._device, self._dtype)

    def _weight(self, path: str) -> Tensor:
        spec = self._specs[path]
        return self._checkpoint.read(spec, 0, spec.numel).reshape(spec.shape)


def _thinned(calibration: CalibrationSet) -> CalibrationSet:
    """Every n-th sequence of the set, with about ROWS rows in all."""
    step = max(1, (calibration.rows.und + calibration.rows.gen) // ROWS)
    header = calibration.header.model_copy(update={"sequences": calibration.header.sequences[::step]})
    return replace(calibration, header=header)


class _Candidates:
    """Encodes the weights of one layer in every format and keeps the decoded values."""

    refit = False

    def __init__(self, checkpoint: Checkpoint, specs: Mapping[str, object], codecs: Sequence[Codec]) -> None:
        self.values: dict[str, list[Tensor]] = {}
        self._checkpoint, self._specs, self._codecs = checkpoint, specs, codecs

    def wants(self, path: str) -> bool:
        return True

    def take(self, paths: Sequence[str], moments: Moments) -> dict[str, Tensor]:
        for path in paths:
            self.values[path] = [self._decoded(codec, path, moments) for codec in self._codecs]
        return {}

    def _decoded(self, codec: Codec, path: str, moments: Moments) -> Tensor:
        spec = self._specs[path]
        unit = Unit(spec.name, (spec,))  # type: ignore[attr-defined, arg-type]
        if isinstance(codec, CalibratedCodec) and codec.calibrated:
            encoding = round_unit(codec, unit, self._checkpoint, moments)
            if isinstance(encoding, Packed):
                return codec.decode(unit, encoding.stored)[unit.name]
            codec = codec.model_copy(update={"rounding": "nearest"})
        tensor = self._checkpoint.read(unit.specs[0], 0, unit.numel).reshape(unit.specs[0].shape)
        return codec.decode(unit, codec.encode(unit, {unit.name: tensor}))[unit.name]
