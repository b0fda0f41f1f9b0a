"""Running from DF11 units: the same outputs as bf16, each unit decoded no more often than it must."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from bagel.flow import FlowSettings
from bagel.loading import parameter_path
from bagel.sampler import Sampler, TextSettings
from bagel_compress.build.artifact import Artifact
from bagel_compress.build.compress import compress
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.codecs import DF11
from bagel_compress.codecs.base import Unit
from bagel_compress.codecs.df11.device import Df11Unit
from bagel_compress.codecs.df11.embedding import DF11Embedding
from bagel_compress.codecs.ring import RingLinear, UnitDecoder, ring_weights
from bagel_compress.errors import CodecError
from bagel_compress.io.tensor_spec import TensorSpec
from bagel_compress.run.load import census, load, open_model
from bagel_compress.source.checkpoint import Checkpoint

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "tests" / "data" / "golden" / "checkpoint"
CPU = torch.device("cpu")
CODEC = DF11.model_validate({"units": "expert"})


def layer_units(layers: int = 3, width: int = 32) -> dict[str, tuple[Df11Unit, torch.Tensor]]:
    """Stored units of some layers by short name ("1.mlp"), each with its flat weights."""
    rng = np.random.default_rng(0)
    specs = [
        TensorSpec("BF16", (width, width), f"language_model.model.layers.{i}.{module}.weight")
        for i in range(layers)
        for module in ("self_attn.q_proj", "self_attn.q_proj_moe_gen", "mlp.up_proj", "mlp_moe_gen.up_proj")
    ]
    units = {}
    for unit in CODEC.units(specs):
        tensors = {s.name: torch.from_numpy(rng.normal(0, 0.02, s.shape)).bfloat16() for s in unit.specs}
        stored = Df11Unit(unit, CODEC.encode(unit, tensors))
        flat = torch.cat([tensors[s.name].flatten() for s in unit.specs])
        units[unit.name.removeprefix("language_model.model.layers.")] = (stored, flat)
    return units


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def test_linears_equal_bf16_bit_for_bit() -> None:
    rng = np.random.default_rng(1)
    unit = Unit("m", tuple(TensorSpec("BF16", shape, f"m.l{k}.weight") for k, shape in enumerate([(48, 64), (64, 48)])))
    tensors = {s.name: torch.from_numpy(rng.normal(0, 0.02, s.shape)).bfloat16() for s in unit.specs}
    bias = torch.linspace(-1, 1, 48).bfloat16()
    modules = CODEC.linears(unit, CODEC.encode(unit, tensors), {"m.l0.weight": bias})
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    first, second = modules["m.l0.weight"], modules["m.l1.weight"]
    expected = torch.nn.functional.linear(x, tensors["m.l0.weight"], bias)
    assert same(first(x), expected)
    assert same(second(expected), torch.nn.functional.linear(expected, tensors["m.l1.weight"]))
    assert isinstance(first, RingLinear)
    assert first.describe()["codec"] == "df11"
    assert first.stored_bytes + second.stored_bytes < 2 * unit.numel * 1.3


def test_any_order_of_units_gives_their_weights() -> None:
    units = layer_units()
    for keep in (0, 5000, 1 << 30):
        decoder = UnitDecoder(CPU, keep_bytes=keep)
        rng = np.random.default_rng(2)
        for name in rng.choice(list(units), 300):
            stored, flat = units[name]
            assert same(decoder.flat(stored), flat), name


def a_pass(units: dict[str, tuple[Df11Unit, torch.Tensor]], decoder: UnitDecoder) -> int:
    """Units as one denoising step asks for them; the weights that were decoded."""
    before = decoder.decoded
    for i in range(3):
        for block in ("self_attn", "self_attn", "mlp", "self_attn", "mlp_moe_gen"):
            decoder.flat(units[f"{i}.{block}"][0])
    return decoder.decoded - before


def test_a_step_decodes_every_unit_once() -> None:
    units, decoder = layer_units(), UnitDecoder(CPU, keep_bytes=0)
    for stored, _ in units.values():
        decoder.expect(stored)
    total = sum(stored.numel for stored, _ in units.values())
    assert [a_pass(units, decoder) for _ in range(3)] == [total] * 3


def test_units_of_the_understanding_expert_stay_where_memory_allows() -> None:
    units = layer_units()
    others = sum(stored.numel for name, (stored, _) in units.items() if not name.endswith("mlp"))
    total = sum(stored.numel for stored, _ in units.values())
    decoder = UnitDecoder(CPU, keep_bytes=1 << 30)
    assert [a_pass(units, decoder) for _ in range(3)] == [total, others, others]
    one = UnitDecoder(CPU, keep_bytes=2 * units["0.mlp"][0].numel)
    assert [a_pass(units, one) for _ in range(2)] == [total, total - units["0.mlp"][0].numel]


def test_the_next_unit_is_known_from_the_pass_before() -> None:
    units, decoder = layer_units(), UnitDecoder(CPU, keep_bytes=0)
    for _ in range(2):
        a_pass(units, decoder)
    decoder.flat(units["0.self_attn"][0])
    decoder.flat(units["0.mlp"][0])
    following = decoder.following(units["0.mlp"][0])
    assert following is not None
    assert following.name.endswith("0.mlp_moe_gen")  # attention comes first, but it is still there


def test_units_of_a_dropped_model_are_freed() -> None:
    units, decoder = layer_units(1), UnitDecoder(CPU, keep_bytes=4000)
    a = [weakref.ref(stored) for stored, _ in units.values()]
    for stored, _ in units.values():
        decoder.flat(stored)
    del units, stored
    gc.collect()
    assert all(r() is None for r in a)


def build(recipe: str, out: Path) -> Artifact:
    checkpoint = Checkpoint.open(CHECKPOINT)
    return compress(make_plan(checkpoint, Recipe.load(ROOT / "recipes" / f"{recipe}.yaml")), checkpoint, out)


@pytest.fixture(scope="module")
def reference() -> Sampler:
    return open_model(CHECKPOINT)


@pytest.mark.parametrize("recipe", ["df11", "df11-expert"])
def test_an_artifact_samples_what_the_checkpoint_samples(recipe: str, reference: Sampler, tmp_path: Path) -> None:
    artifact = build(recipe, tmp_path / recipe)
    sampler = load(artifact)
    settings = {"flow": FlowSettings(num_timesteps=2), "size": (64, 48), "seed": 1}
    ours, theirs = (s.run(["a red cat"], **settings) for s in (sampler, reference))
    assert ours.image.tobytes() == theirs.image.tobytes()
    text = TextSettings(max_tokens=3)
    ours, theirs = (s.run([ours.image, "what is this?"], output="text", text=text) for s in (sampler, reference))
    assert ours.text == theirs.text
    assert {row.codec for row in census(sampler.bagel, artifact)} == {"df11", "raw"}


@pytest.mark.parametrize("recipe", ["df11-gen-nf4-und", "df11-und-nf4-gen"])
def test_lossless_and_lossy_in_one_artifact(recipe: str, reference: Sampler, tmp_path: Path) -> None:
    artifact = build(recipe, tmp_path / recipe)
    whole = dict(reference.bagel.named_parameters())
    lossless = "gen" if recipe.startswith("df11-gen") else "und"
    for name, entry in artifact.manifest.units.items():
        for tensor, value in artifact.decode(name).items():
            path = parameter_path(tensor)
            if f".{lossless}." in path or "lm_head" in path or "vit" in path:
                assert same(value, whole[path])
            elif entry.codec.format == "nf4":
                assert entry.snr_db is not None
                assert entry.snr_db > 15 if entry.rounded is None else entry.rounded.error < 0.01
    formats = {entry.codec.format for entry in artifact.manifest.units.values()}
    assert formats == {"df11", "nf4", "raw"}


def test_the_ring_holds_two_layer_units_or_the_largest_unit() -> None:
    layer, head = "language_model.model.layers.{}.mlp", "language_model.lm_head"
    units = [(layer.format(i), 203_685_888) for i in range(28)]
    assert ring_weights(units) == 2 * 203_685_888
    assert ring_weights([*units, (head, 544_997_376)]) == 544_997_376
    assert ring_weights([("vit_model", 100)]) == 128
    assert ring_weights([]) == 0


def coded_table(rows: int = 3000, width: int = 96) -> tuple[Unit, dict[str, torch.Tensor], torch.Tensor]:
    table = torch.from_numpy(np.random.default_rng(2).normal(0, 0.02, (rows, width))).bfloat16()
    unit = Unit("e", (TensorSpec("BF16", (rows, width), "e.weight"),))
    return unit, CODEC.encode(unit, {"e.weight": table}), table


def test_an_embedding_decodes_the_rows_that_are_looked_up() -> None:
    unit, parts, table = coded_table()
    embedding = DF11Embedding(unit, parts)
    decoded: list[int] = []
    fill = embedding._filling.blocks
    embedding._filling.blocks = lambda start, stop: (decoded.extend(range(start, stop)), fill(start, stop))[1]  # type: ignore[method-assign]
    ids = torch.tensor([[0, 7], [2999, 0]])
    assert torch.equal(embedding(ids), table[ids])
    assert torch.equal(embedding(ids), table[ids])
    assert len(decoded) == len(set(decoded)) <= 4 < embedding._there.size
    assert torch.equal(embedding(torch.arange(3000)), table)
    assert embedding.describe()["codec"] == "df11"


def test_a_damaged_embedding_is_an_error_when_it_is_used() -> None:
    unit, parts, _ = coded_table()
    parts["e.encoded_exponent"] = parts["e.encoded_exponent"] ^ 0x5A
    with pytest.raises(CodecError, match=r"^e: .*damaged"):
        DF11Embedding(unit, parts)(torch.arange(3000))


def test_an_artifact_keeps_its_embeddings_coded(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(CHECKPOINT)
    artifact = compress(make_plan(checkpoint, Recipe.load(ROOT / "recipes/df11.yaml")), checkpoint, tmp_path / "a")
    sampler = load(artifact)
    assert isinstance(sampler.bagel.embed_tokens, DF11Embedding)
    rows = {row.name: row for row in census(sampler.bagel, artifact)}
    assert rows["language_model.model.embed_tokens.weight"].codec == "df11"
