"""Builds that round by a calibration set: what they change, what they refuse, and that they go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from bagel_compress.build.artifact import Artifact
from bagel_compress.build.compress import compress
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.calibrate.calibration_set import (
    CalibrationSet,
    DecodedText,
    Header,
    RecordedSequence,
    TextPass,
    save,
)
from bagel_compress.cli import main
from bagel_compress.errors import CalibrationError, PlanError
from bagel_compress.io.packaged import resource
from bagel_compress.source.checkpoint import Checkpoint
from bagel_compress.source.synthetic import synthesise

TINY = Path(__file__).parents[1] / "data/golden/checkpoint"
RECIPE = """
name: calibrated
rules:
  - match: {{component: llm, kind: linear, expert: {experts}}}
    codec: {{format: nf4, double_quant: true, scale: mse, rounding: {rounding}}}
  - match: {{component: llm, kind: head}}
    codec: int8
  - match: {{}}
    codec: raw
"""
REFIT = "{method: gptq, refit: true}"
TINY_SET = resource("calibration") / "tiny.safetensors"


def recipe(rounding: str = "gptq", experts: str = "[und, gen]") -> Recipe:
    return Recipe.parse(RECIPE.format(rounding=rounding, experts=experts), "calibrated.yaml")


@pytest.fixture(scope="module")
def tiny() -> Checkpoint:
    return Checkpoint.open(TINY)


@pytest.fixture(scope="module")
def refitted(tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return compress(make_plan(tiny, recipe(REFIT)), tiny, tmp_path_factory.mktemp("refit") / "artifact")


def tensors(path: Path) -> dict[str, torch.Tensor]:
    found = {}
    for shard in sorted(path.glob("*.safetensors")):
        with safe_open(str(shard), framework="pt") as handle:
            found |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    return found


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def changed_set(
    path: Path, update: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None
) -> CalibrationSet:
    """The tiny checkpoint's set with other fields in its header, or other tensors."""
    found = CalibrationSet.open(TINY_SET)
    stored = {name: found.tensor(name) for name in found.shapes} | dict(tensors or {})
    save(path, Header.model_validate(found.header.model_copy(update=dict(update)).model_dump()), stored)
    return CalibrationSet.open(path)


def test_only_codes_and_scales_differ_from_nearest(tiny: Checkpoint, refitted: Artifact, tmp_path: Path) -> None:
    nearest = compress(make_plan(tiny, recipe("nearest")), tiny, tmp_path / "nearest")
    ours, theirs = tensors(refitted.path), tensors(nearest.path)
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    assert refitted.nbytes == nearest.nbytes
    differ = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    parts = ("weight", "absmax", "nested_absmax", "bitsandbytes__nf4")
    assert all(".layers." in name and name.endswith(parts) for name in differ)
    down = {
        name for name in differ if "down_proj" in name
    }  # 160 wide: no whole blocks of 64, each weight rounded alone
    assert down == set()
    assert {n for n, u in nearest.manifest.units.items() if ".layers." in n and u.codec.format == "nf4"} - {
        name for name in refitted.manifest.units if "down_proj" in name
    } <= differ


def test_the_manifest_says_what_was_done(refitted: Artifact) -> None:
    manifest = refitted.manifest
    assert manifest.calibration is not None
    assert manifest.calibration.digest == CalibrationSet.open(TINY_SET).digest
    assert manifest.calibration.rows_gen == CalibrationSet.open(TINY_SET).rows.gen
    rounded = [unit.rounded for unit in manifest.units.values() if unit.rounded is not None]
    assert len(rounded) == 3 * 2 * 6
    assert all(entry.error < entry.nearest for entry in rounded)
    alone = [u for name, u in manifest.units.items() if "layers" in name and "down_proj" in name]
    assert all("rounded alone" in unit.reason for unit in alone)
    assert refitted.verify() == []


def test_a_build_that_stopped_goes_on_with_the_same_bytes(tiny: Checkpoint, refitted: Artifact, tmp_path: Path) -> None:
    plan = make_plan(tiny, recipe(REFIT))

    class StoppedError(Exception):
        pass

    def stop(unit: str, nbytes: int) -> None:
        if "layers.2.mlp" in unit:
            raise StoppedError

    with pytest.raises(StoppedError):
        compress(plan, tiny, tmp_path / "artifact", stop)
    assert list((tmp_path / "artifact" / ".build").glob("model-0000[23]*.json"))  # layers 0 and 1 are finished
    compress(plan, tiny, tmp_path / "artifact")
    assert files(tmp_path / "artifact") == files(refitted.path)


def test_the_plan_depends_on_the_set(tiny: Checkpoint, tmp_path: Path) -> None:
    packaged = make_plan(tiny, recipe())
    other = make_plan(tiny, recipe(), changed_set(tmp_path / "other", {"source": "somebody/else"}))
    assert packaged.digest != other.digest
    assert make_plan(tiny, recipe("nearest"), other.calibration).digest == make_plan(tiny, recipe("nearest")).digest


def test_without_a_set_there_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synthesise("tiny", tmp_path / "source", seed=3, layers=2)
    checkpoint = Checkpoint.open(tmp_path / "source")
    plan = make_plan(checkpoint, recipe())
    assert plan.calibrated
    assert plan.calibration is None
    with pytest.raises(CalibrationError, match="bagel-compress calibrate --source"):
        compress(plan, checkpoint, tmp_path / "out")
    assert main(["compress", "nf4", "--source", str(tmp_path / "source"), "--out", str(tmp_path / "out")]) == 2
    assert "nf4-nearest" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_set_of_another_model_is_refused(tiny: Checkpoint, tmp_path: Path) -> None:
    nano = CalibrationSet.open(resource("calibration") / "BAGEL-nano.safetensors")
    with pytest.raises(CalibrationError, match="vocabulary = 512, this checkpoint has 608"):
        make_plan(tiny, recipe(), nano)
    with pytest.raises(CalibrationError, match="another tokenizer"):
        make_plan(tiny, recipe(), changed_set(tmp_path / "other", {"tokenizer": "0" * 64}))


def test_a_set_that_is_too_small_is_refused(tiny: Checkpoint, tmp_path: Path) -> None:
    header = CalibrationSet.open(TINY_SET).header
    few = changed_set(tmp_path / "few", {"sequences": header.sequences[-1:]})
    with pytest.raises(CalibrationError, match=r"gives .*moe_gen.* 0 rows of inputs, 40 fewer than the 40"):
        make_plan(tiny, recipe(experts="gen"), few)


def test_rows_that_are_all_equal_are_refused(tiny: Checkpoint, tmp_path: Path) -> None:
    same = RecordedSequence(
        name="same", trunk=(TextPass(ids=(7,) * 40),), branches=(DecodedText(after=1, ids=(7,) * 60),)
    )
    plan = make_plan(tiny, recipe(experts="und"), changed_set(tmp_path / "same", {"sequences": (same,)}))
    with pytest.raises(CalibrationError, match="all 100 rows of inputs that the calibration set gave are equal"):
        compress(plan, tiny, tmp_path / "out")


def test_a_latent_with_nan_is_refused(tiny: Checkpoint, tmp_path: Path) -> None:
    latent = CalibrationSet.open(TINY_SET).latent(1)
    latent[0, 0, 0] = torch.nan
    plan = make_plan(tiny, recipe(), changed_set(tmp_path / "nan", {}, {"latent/1": latent}))
    with pytest.raises(CalibrationError, match=r"latent 1 of .* holds NaN"):
        compress(plan, tiny, tmp_path / "out")


def test_other_linears_have_no_moments(tiny: Checkpoint) -> None:
    text = "{name: vit, rules: [{match: {component: vit, kind: linear}, codec: {format: int8, rounding: gptq}},"
    with pytest.raises(PlanError, match="only the linear weights of the decoder layers"):
        make_plan(tiny, Recipe.parse(text + " {match: {}, codec: raw}]}", "vit"))


@pytest.mark.parametrize("content", [b"", b"no safetensors", TINY_SET.read_bytes()[:4000]])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "set.safetensors"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match="is truncated or no safetensors file"):
        CalibrationSet.open(path)


def test_a_foreign_or_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="is no calibration set"):
        CalibrationSet.open(resource("BAGEL-nano") / "ema.safetensors")
    with pytest.raises(CalibrationError, match="does not exist"):
        CalibrationSet.open(tmp_path / "nothing")


def test_events_that_point_nowhere_are_named(tmp_path: Path) -> None:
    lost = RecordedSequence(name="lost", trunk=(TextPass(ids=(7,)),), branches=(DecodedText(after=2, ids=(7,)),))
    with pytest.raises(CalibrationError, match="sequence lost holds a branch after 2 of 1 events"):
        changed_set(tmp_path / "lost", {"sequences": (lost,)})
    with pytest.raises(CalibrationError, match=r"holds a token id outside of 0 \.\. 607"):
        changed_set(tmp_path / "id", {"sequences": (RecordedSequence(name="id", trunk=(TextPass(ids=(608,)),)),)})


def test_packaged_recipes_are_calibrated_and_planned_without_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "nf4", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["calibrated"]
    assert data["calibration"] is None
    assert main(["plan", "nf4-nearest", "--json"]) == 0
    nearest = json.loads(capsys.readouterr().out)
    assert not nearest["calibrated"]
    assert nearest["bytes"] == data["bytes"]
