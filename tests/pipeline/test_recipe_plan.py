"""Recipes say what is wrong with them; plans are total, exact and quick."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pipeline_data import RAW

from bagel.layout import official_role
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.errors import PlanError, RecipeError
from bagel_compress.io.packaged import find_recipe, resource
from bagel_compress.source.checkpoint import Checkpoint
from bagel_compress.source.released_header import TrueHeader

GOOD = """
name: good
rules:
  - match: {component: llm, kind: [linear, head], layer: [0-1, 2]}
    codec: {format: nf4, double_quant: true}
  - match: {}
    codec: raw
limits: {class: 4-bit}
"""


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("format: nf4", "format: nf44", r"rule 1: unknown codec 'nf44' \(did you mean nf4\?\)"),
        ("double_quant", "double_quants", r"rule 1 has an unknown key 'double_quants' \(did you mean double_quant\?\)"),
        ("double_quant: true", "double_quant: 3.5", r"rule 1: codec.double_quant: input should be a valid boolean"),
        ("kind:", "kinds:", r"rule 1 has an unknown key 'kinds' \(did you mean kind\?\)"),
        ("llm", "lm", r"rule 1: component is 'lm' \(did you mean llm\?\)"),
        ("linear", "linnear", r"rule 1: kind is 'linnear' \(did you mean linear\?\)"),
        ("0-1", "one", r"rule 1: layer is 'one', expected a number such as 3 or a range"),
        ("codec: raw", "codex: raw", r"rule 2 has no codec"),
        ("codec: raw", "codec: raw\n    codex: raw", r"rule 2 has an unknown key 'codex' \(did you mean codec\?\)"),
        ("limits", "limit", r"unknown key 'limit' \(did you mean limits\?\)"),
        ("class", "clas", r"unknown key 'clas' \(did you mean class\?\)"),
        ("4-bit", "5-bit", r"limits.class: .*'5-bit'"),
        (
            "class: 4-bit",
            "class: 4-bit, overrides: {latent.pth: 0.1}",
            r"limits: unknown metric 'latent.pth' \(did you mean latent.path\?\); metrics are latent.path,",
        ),
        ("class: 4-bit", "class: 4-bit, overrides: {logits.rel_l2: 0.1}", r"limits: unknown metric 'logits.rel_l2'"),
        ("name: good", "name: good\ntargets: [24gb, 12bg]", r"targets: '12bg' is unknown \(did you mean 12gb\?\)"),
        ("name: good", "name: good\nexport: ort-cpux", r"export: 'ort-cpux' is unknown \(did you mean ort-cpu\?\)"),
        ("name: good", "name: good\nexport: 24gb", r"export: '24gb' is unknown.*; expected one of ort-cpu,"),
        ("name: good", "name: a/b", r"name: .*'a/b'"),
        ("rules:", "rules: []\nx:", r"rules"),
        ("name:", "name: [", r"is not YAML"),
    ],
)
def test_recipe_errors_name_file_rule_and_suggestion(old: str, new: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        Recipe.parse(GOOD.replace(old, new, 1), "my/recipe.yaml")
    assert str(caught.value).startswith("my/recipe.yaml")
    assert "\n" not in str(caught.value)


def test_a_target_may_lie_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\ndevice: {name: x, memory_mib: 1000}\n")
    (tmp_path / "recipe.yaml").write_text(GOOD + "targets: [mine]\n")
    assert Recipe.load(tmp_path / "recipe.yaml").targets == ("mine",)


def test_a_recipe_in_a_manifest_may_name_what_this_version_does_not_know() -> None:
    data = Recipe.parse(GOOD, "x").model_dump(mode="json", by_alias=True)
    data |= {"targets": ["gone"], "export": "gone", "limits": {"class": "4-bit", "overrides": {"gone.metric": 1.0}}}
    assert Recipe.model_validate(data).targets == ("gone",)


def test_a_recipe_survives_json() -> None:
    recipe = Recipe.parse(GOOD, "x")
    again = Recipe.model_validate(recipe.model_dump(mode="json", by_alias=True))
    assert again == recipe
    assert again.digest == recipe.digest
    assert Recipe.parse("# comment\n" + GOOD, "x").digest == recipe.digest
    assert Recipe.parse(GOOD.replace("4-bit", "8-bit"), "x").digest != recipe.digest


def test_every_tensor_has_exactly_its_first_rule(tiny: Checkpoint) -> None:
    plan = make_plan(tiny, Recipe.parse(GOOD, "x"))
    placed = [spec.name for p in plan.placements for spec in p.unit.specs]
    assert sorted(placed) == [spec.name for spec in tiny.specs]
    codecs = {s.name: p.codec.format for p in plan.placements for s in p.unit.specs}
    assert codecs["language_model.model.layers.2.self_attn.q_proj_moe_gen.weight"] == "nf4"
    assert codecs["language_model.model.layers.2.self_attn.q_proj_moe_gen.bias"] == "raw"
    assert codecs["language_model.lm_head.weight"] == "raw"  # the head is in no layer
    assert codecs["vit_model.vision_model.encoder.layers.0.mlp.fc1.weight"] == "raw"


def test_shards_follow_the_model(tiny: Checkpoint, raw: Recipe) -> None:
    plan = make_plan(tiny, raw)
    assert plan.shards == tuple(f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6))
    names = [[p.unit.name for p in plan.in_shard(shard)] for shard in plan.shards]
    assert names[0] == ["language_model.lm_head.weight", "language_model.model.embed_tokens.weight"]
    assert all(name.startswith("language_model.model.layers.1.") for name in names[2])
    assert "language_model.model.norm.weight" in names[4]


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ("[{match: {component: vit}, codec: raw}]", r"no rule for connector.fc1.bias \(connector, shared, bias\)"),
        ("[{match: {}, codec: raw}, {match: {kind: bias}, codec: raw}]", r"rule 2 .*earlier rules take its 37 tensors"),
        ("[{match: {component: vae}, codec: raw}, {match: {}, codec: raw}]", r"rule 1 .*the checkpoint has none such"),
        (
            "[{match: {name: '*.w8'}, codec: raw}, {match: {}, codec: raw}]",
            r"rule 1 matches no tensor \(name: \*\.w8\)",
        ),
        ("[{match: {}, codec: nf4}]", r"connector.fc1.bias: codec nf4"),
    ],
)
def test_recipes_that_do_not_fit(tiny: Checkpoint, rules: str, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        make_plan(tiny, Recipe.parse(f"name: x\nrules: {rules}", "x"))


def test_a_budget_is_kept_or_refused_with_the_largest_parts(tiny: Checkpoint) -> None:
    size = make_plan(tiny, Recipe.parse(RAW, "x")).nbytes
    make_plan(tiny, Recipe.parse(f"{RAW}\nbudget_gb: {size / 1e9}", "x"))
    with pytest.raises(PlanError, match=r"its budget is .* the largest parts are llm gen in raw"):
        make_plan(tiny, Recipe.parse(f"{RAW}\nbudget_gb: {(size - 1) / 1e9}", "x"))


def test_the_digest_knows_recipe_and_source(tiny: Checkpoint) -> None:
    def digest(text: str, source: object = tiny) -> str:
        return make_plan(source, Recipe.parse(text, "x")).digest  # type: ignore[arg-type]

    assert digest(GOOD) == digest(GOOD)
    assert len({digest(GOOD), digest(GOOD.replace("true", "false")), digest(GOOD, TrueHeader()), digest(RAW)}) == 4


def test_the_carried_header_is_the_released_checkpoint() -> None:
    specs = TrueHeader().specs
    assert len(specs) == 1223
    assert sum(s.numel for s in specs) == 14_607_260_128  # bagel.md section 2: computed from the official classes
    assert sum(s.nbytes for s in specs) == 29_214_520_256
    linears = [s for s in specs if official_role(s.name).kind in ("linear", "head")]
    assert len(linears) == 556
    assert sum(s.numel for s in linears) == 14_023_292_416


def _codec_known(path: object) -> bool:
    from bagel_compress.codecs import CODECS

    known = {codec.name() for codec in CODECS}
    text = resource("recipes").joinpath(str(path)).read_text("utf-8")
    return set(re.findall(r"(?:codec|format): (\w+)", text)) <= known


@pytest.mark.parametrize("path", sorted(p.name for p in resource("recipes").glob("*.yaml")))
def test_packaged_recipes_plan_on_the_carried_header_in_under_a_second(path: str) -> None:
    if not _codec_known(path):
        pytest.skip("needs a codec that is not there yet")
    recipe = Recipe.load(find_recipe(f"recipes/{path}"))
    assert recipe.name == path.removesuffix(".yaml")
    for _ in range(3):  # the bound holds for the code, not for what else the machine does: one try of three meets it
        start = time.process_time()
        plan = make_plan(TrueHeader(), recipe)
        text = plan.table()
        if (seconds := time.process_time() - start) < 1.0:
            break
    assert seconds < 1.0
    assert f"{14_607_260_128:,}" in text
    assert sum(g.tensors for g in plan.groups) == 1223


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys; from bagel_compress.cli import main; code = main(['plan', 'nf4-12gb']);"
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'numba', 'huggingface_hub')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "14,607,260,128" in done.stdout


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(RecipeError, match="nf4-12gb"):
        find_recipe("nf5")
