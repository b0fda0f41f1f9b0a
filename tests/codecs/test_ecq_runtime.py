"""Running from ecq weights: what the decoded weight would give, rows without the table, a ring shared with others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from codec_weights import NAME, encoded, unit_of, weight

from bagel.flow import FlowSettings
from bagel.sampler import TextSettings
from bagel_compress.build.compress import compress
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.codecs.base import Unit
from bagel_compress.codecs.ecq import Ecq, runtime
from bagel_compress.codecs.ecq.device import StoredWeight
from bagel_compress.codecs.ecq.layout import RUN
from bagel_compress.codecs.ring import RingLinear, UnitDecoder
from bagel_compress.errors import CodecError
from bagel_compress.io.tensor_spec import TensorSpec
from bagel_compress.run.load import census, load
from bagel_compress.source.checkpoint import Checkpoint

CHECKPOINT = Path(__file__).parents[2] / "tests" / "data" / "golden" / "checkpoint"
CODEC = Ecq(bits=4.13)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 40).bfloat16()], ids=["plain", "bias"])
def test_a_linear_multiplies_the_decoded_weight(bias: torch.Tensor | None) -> None:
    tensor = weight(40, 300)
    unit, parts = unit_of(tensor), encoded(CODEC, tensor)
    module = CODEC.linears(unit, parts, {} if bias is None else {NAME: bias})[NAME]
    x = torch.randn(5, 300).bfloat16()
    assert same(module(x), torch.nn.functional.linear(x, CODEC.decode(unit, parts)[NAME], bias))
    assert isinstance(module, RingLinear)
    assert module.describe() == {"codec": "ecq", "stored": "ecq", "compute": "bfloat16"}
    assert module.stored_bytes == sum(part.nbytes for part in parts.values())


def test_a_large_weight_is_multiplied_slice_by_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "SLICE", 4 * RUN)
    tensor, bias = weight(70, 384), torch.linspace(-1, 1, 70).bfloat16()
    unit, parts = unit_of(tensor), encoded(CODEC, tensor)
    module = CODEC.linears(unit, parts, {NAME: bias})[NAME]
    assert isinstance(module, runtime.SlicedLinear)
    assert [part.out_features for part in module.slices] == [16, 16, 16, 16, 6]  # whole runs are 16 rows of 384
    x = torch.randn(3, 384)
    decoded = CODEC.decode(unit, parts)[NAME].float()
    expected = x @ decoded.T + bias.float()
    assert torch.allclose(module(x.bfloat16()).float(), expected, atol=0.02)
    assert abs(module.stored_bytes - sum(part.nbytes for part in parts.values())) < 5


@pytest.mark.parametrize("width", [100, 2048, 3000])
def test_rows_of_a_table(width: int) -> None:
    tensor = weight(50, width)
    unit, parts = unit_of(tensor), encoded(CODEC, tensor)
    table = CODEC.embedding(unit, parts)
    ids = torch.tensor([[3, 49, 0], [3, 7, 48]])
    assert same(table(ids), CODEC.decode(unit, parts)[NAME][ids])
    assert same(table(torch.tensor([], dtype=torch.int64)), tensor[:0])
    for wrong in (50, -1):
        with pytest.raises(IndexError):
            table(torch.tensor([1, wrong]))


def test_only_the_runs_of_a_row_are_decoded() -> None:
    """Damage elsewhere does not show; damage there is an error with the table's name."""
    tensor = weight(50, 2048)
    unit, parts = unit_of(tensor), encoded(CODEC, tensor)
    stream = parts[f"{NAME}.stream"]
    stream[-200:] = 255
    table = CODEC.embedding(unit, parts)
    assert table(torch.tensor([5])).shape == (1, 2048)
    with pytest.raises(CodecError, match=NAME):
        table(torch.tensor([49]))


def test_weights_take_turns_in_one_ring() -> None:
    tensors = {f"language_model.model.layers.{i}.mlp.up_proj.weight": weight(32, 256, seed=i) for i in range(4)}
    stored, expected = [], []
    for name, tensor in tensors.items():
        unit = Unit(name, (TensorSpec("BF16", (32, 256), name),))
        parts = CODEC.encode(unit, {name: tensor})
        stored += StoredWeight(unit, parts).slices(1 << 20)
        expected.append(CODEC.decode(unit, parts)[name].flatten())
    decoder = UnitDecoder(torch.device("cpu"), keep_bytes=0)
    for _ in range(3):
        for k in (0, 1, 2, 1, 3):
            assert same(decoder.flat(stored[k]), expected[k])
    assert decoder.ring_bytes == 2 * 2 * 32 * 256


def test_an_artifact_samples_what_its_decoded_weights_sample(tmp_path: Path) -> None:
    """Linears, head and token table run from what is stored; bit for bit what the decoded weights give."""
    rules = [
        {"match": {"component": "llm", "kind": ["linear", "head", "embedding"]}, "codec": {"format": "ecq", "bits": 5}},
        {"match": {}, "codec": "raw"},
    ]
    checkpoint = Checkpoint.open(CHECKPOINT)
    artifact = compress(make_plan(checkpoint, Recipe(name="ecq", rules=rules)), checkpoint, tmp_path / "a")
    stored, decoded = load(artifact), load(artifact, dtype=torch.bfloat16)
    assert {row.codec for row in census(stored.bagel, artifact)} == {"ecq", "raw"}
    settings = {"flow": FlowSettings(num_timesteps=2), "size": (64, 48), "seed": 1}
    images = [sampler.run(["a red cat"], **settings).image.tobytes() for sampler in (stored, decoded)]
    assert images[0] == images[1]
    text = TextSettings(max_tokens=3)
    answers = [sampler.run(["what is this?"], output="text", text=text).text for sampler in (stored, decoded)]
    assert answers[0] == answers[1]
