"""A format that stands in one file, here, goes through the whole program: no other file knows its name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch

from bagel_compress import codecs
from bagel_compress.budgets.fake_model import BuildOutline
from bagel_compress.budgets.planned_build import checkpoint_sizes
from bagel_compress.budgets.predict import predict
from bagel_compress.build.compress import compress
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.codecs.base import Chunk, Encoding, Reader, Unit
from bagel_compress.codecs.matrix import MatrixCodec
from bagel_compress.errors import ExportError
from bagel_compress.io.tensor_spec import PartSpec, TensorSpec
from bagel_compress.publishing.card_sections import Origin
from bagel_compress.publishing.model_card import model_card
from bagel_compress.publishing.release_reports import load_reports
from bagel_compress.run.case import Case, Flow
from bagel_compress.run.load import census, load
from bagel_compress.run.target import Device, Target, Workload
from bagel_compress.source.checkpoint import Checkpoint
from bagel_compress.validation.artifact import record_source, validate_artifact

RECIPE = """
name: toy
limits: {class: 8-bit}
rules:
  - match: {component: llm, kind: linear}
    codec: toy
  - match: {}
    codec: raw
"""
SMALL = Workload(image=(64, 64), input_image=(64, 64), prompt_tokens=8, think_tokens=8, answer_tokens=8)
TARGET = Target(name="toy", device=Device(name="x", memory_mib=1000), sizes=SMALL, tasks=("t2i",))


class Toy(MatrixCodec):
    """bf16 without the lowest bit of the mantissa."""

    format: Literal["toy"] = "toy"
    tag: ClassVar[str] = "15-bit"

    def parts(self, unit: Unit) -> dict[str, PartSpec]:
        (spec,) = unit.specs
        return {f"{spec.name}.toy": PartSpec("I16", spec.shape)}

    def begin(self, unit: Unit, source: Reader) -> Encoding:
        return ToyEncoding(codec=self, parts=self.parts(unit), spec=unit.specs[0], source=source)

    def decode(self, unit: Unit, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        (spec,) = unit.specs
        return {spec.name: (parts[f"{spec.name}.toy"] << 1).view(torch.bfloat16)}


@dataclass(slots=True, kw_only=True)
class ToyEncoding(Encoding):
    spec: TensorSpec
    source: Reader

    def chunks(self) -> Iterator[Chunk]:
        values = self.source.read(self.spec, 0, self.spec.numel)
        kept = (values.view(torch.int16) >> 1).contiguous()
        lost = values.float() - (kept << 1).view(torch.bfloat16).float()
        self.quality.add(float(values.float().square().sum()), float(lost.square().sum()))
        yield Chunk(f"{self.spec.name}.toy", 0, kept.view(torch.uint8).numpy())


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe of the toy format, which is in CODECS for as long as a test runs."""
    monkeypatch.setattr(codecs, "CODECS", (*codecs.CODECS, Toy))
    return Recipe.parse(RECIPE, "toy.yaml")


def test_a_toy_codec_goes_through_the_whole_program(recipe: Recipe, tiny: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny)
    plan = make_plan(source, recipe)
    assert {g.codec for g in plan.groups} == {"toy", "raw"}

    artifact = compress(plan, source, tmp_path / "artifact")
    assert artifact.verify() == []
    assert plan.nbytes == artifact.nbytes

    sampler = load(artifact)
    rows = [row for row in census(sampler.bagel, artifact) if row.codec == "toy"]
    assert len(rows) == 42  # 7 matrices, 2 experts, 3 layers
    assert {row.compute for row in rows} == {"decoded to bfloat16"}

    planned, built = BuildOutline.of_plan(plan, *checkpoint_sizes(source)), BuildOutline.of_artifact(artifact)
    assert predict(planned, TARGET).phases == predict(built, TARGET).phases

    case = Case(name="t2i", kind="t2i", turns=("a red cat",), size=(64, 64), flow=Flow(num_timesteps=4))
    trace = tmp_path / "trace.safetensors"
    record_source(tiny, [(case, tmp_path)], trace)
    report = validate_artifact(artifact.path, [trace])
    assert sum(module.codec == "toy" for module in report.modules) == 42
    assert not report.faults
    assert "toy" in (artifact.path / "report.html").read_text(encoding="utf-8")

    card = model_card(artifact, load_reports(artifact)[0], Origin("me/toy", None))
    assert "15-bit" in card
    assert "matrices in `toy`" in card


def test_a_format_without_an_onnx_form_or_a_comfyui_form_says_so() -> None:
    unit = Unit("x.weight", (TensorSpec("BF16", (4, 4), "x.weight"),))
    with pytest.raises(ExportError, match=r"x\.weight: codec toy has no ONNX form"):
        Toy().onnx_form("x.weight", "onnxruntime", "float")
    with pytest.raises(ExportError, match=r"x\.weight: codec toy has no ONNX form"):
        Toy().onnx_codes(unit.specs[0], {})
    with pytest.raises(ExportError, match=r"x\.weight is toy; a ComfyUI file"):
        Toy().comfyui_values(unit, {})
