"""Planted faults: each must be caught by a limit or a diagnosis, and named in the report."""

import copy
from dataclasses import replace

import pytest
import torch

from bagel.sampler import Branches, Sampler
from bagel_compress.build.limits import Metric, resolve
from bagel_compress.codecs import by_name
from bagel_compress.parity.compare import Candidate, compare
from bagel_compress.parity.diagnose import Probes, diagnose_modules, probe_values
from bagel_compress.parity.metrics import gain
from bagel_compress.report.html import render

NF4 = torch.tensor(
    [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
     0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
)  # fmt: skip


def nf4(weight):
    """Round trip through NF4 in blocks of 64."""
    blocks = weight.float().reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    codes = torch.bucketize((blocks / scale).contiguous(), (NF4[1:] + NF4[:-1]) / 2)
    return (NF4[codes] * scale).reshape(weight.shape).to(weight.dtype)


def int8(weight, headroom=1.0):
    """Round trip through int8 with a scale per row; less headroom saturates."""
    scale = weight.float().abs().amax(1, keepdim=True) * headroom / 127
    return ((weight.float() / scale).round().clamp(-127, 127) * scale).to(weight.dtype)


def expert_linears(bagel):
    return {
        path: m for path, m in bagel.named_modules() if path.startswith("layers.") and isinstance(m, torch.nn.Linear)
    }


@pytest.fixture
def plain(reference):
    """A model of its own that may be broken."""
    return Sampler(copy.deepcopy(reference.bagel), copy.deepcopy(reference.vae), reference.text)


@pytest.fixture
def quantised(plain):
    for module in expert_linears(plain.bagel).values():
        module.weight.data = nf4(module.weight.data)
    return plain


def judge(sampler, trace_file, level="lossless", form=None, reference=None):
    codecs = {path: by_name()[form]() for path in expert_linears(sampler.bagel)} if form else {}
    subject = Candidate(sampler, "planted", "0" * 64, level, resolve(level, {}), codecs)
    return compare(subject, [trace_file], reference)


def named(found, words):
    """The fault is in the report, and on its page."""
    assert not found.report.passed
    assert any(words in fault for fault in found.report.faults), found.report.faults
    assert words in render(found.report, {}).replace("&#x27;", "'")


def test_errors_are_attributed_only_beside_a_reference(plain, reference, trace_file):
    subject = Candidate(plain, "planted", "0" * 64, "lossless", resolve("lossless", {}))
    for given, wanted in ((None, 0), (reference, 1)):
        said = []
        compare(subject, [trace_file], given, said.append)
        assert said.count("attributing the error to components") == wanted


def test_modules_of_zeros_have_no_gain_to_lose():
    zeros = {"layers.0.und.q_proj": torch.zeros(4, 8)}
    assert diagnose_modules(Probes(zeros), Probes(zeros), {}, resolve("8-bit", {})[Metric.LINEAR_GAIN]) == []


def test_an_unbroken_model_passes(plain, trace_file):
    found = judge(plain, trace_file)
    assert found.report.passed
    assert all(row.value == row.limit for row in found.report.rows)


def test_an_unbroken_nf4_model_has_no_faults(quantised, trace_file):
    assert judge(quantised, trace_file, "4-bit", "nf4").report.faults == ()


def test_a_scale_off_by_two_percent(quantised, trace_file):
    for path, module in expert_linears(quantised.bagel).items():
        if path.startswith("layers.1.gen."):
            module.weight.data *= 1.02
    found = judge(quantised, trace_file, "4-bit", "nf4")
    named(found, "layers.1.gen has a wrong scale")
    assert len(found.report.faults) == 1
    assert any("linear.gain" in sentence for sentence in found.report.broken)


def test_a_gain_that_few_answers_cannot_tell_from_one_is_no_fault():
    """Eight answers that are right on average but scatter by a third, as a small head's do; and twice as long ones."""
    scatter = torch.tensor([1.33, 0.67] * 4).reshape(8, 1)
    wanted = torch.cat([torch.zeros(1, 64), torch.randn(8, 64, generator=torch.Generator().manual_seed(0))])
    found = torch.cat([torch.zeros(1, 64), wanted[1:] * scatter])
    limit = resolve("4-bit", {})["linear.gain"]
    assert abs(gain(found[1:], wanted[1:]) - 1) > 0.01
    reference = Probes({"lm_head": wanted})
    assert diagnose_modules(Probes({"lm_head": found}), reference, {}, limit) == []
    [fault] = diagnose_modules(Probes({"lm_head": 2 * found}), reference, {}, limit)
    assert "lm_head has a wrong scale" in fault
    assert probe_values(reference, reference)["linear.gain"] == 0.0


def test_a_dropped_bias(quantised, trace_file):
    quantised.bagel.layers[2].und.k_proj.bias = None
    found = judge(quantised, trace_file, "4-bit", "nf4")
    named(found, "layers.2.und.k_proj lost its bias")
    assert any("linear.bias" in sentence for sentence in found.report.broken)


def test_swapped_experts(quantised, trace_file):
    layer = quantised.bagel.layers[1]
    layer.und, layer.gen = layer.gen, layer.und
    found = judge(quantised, trace_file, "4-bit", "nf4")
    named(found, "layers.1.und and layers.1.gen are swapped")
    assert any("latent.path" in sentence for sentence in found.report.broken)


def test_the_layer_where_swapped_experts_begin_to_drift(plain, trace_file):
    layer = plain.bagel.layers[1]
    layer.und, layer.gen = layer.gen, layer.und
    report = judge(plain, trace_file).report
    assert {c.drift for c in report.cases if c.name == "t2i"} == {"01_text layer1"}


def test_a_branch_that_is_not_forked(plain, trace_file, monkeypatch):
    monkeypatch.setattr(
        Branches, "text_dropped", property(lambda self: self.cond, lambda self, value: None), raising=False
    )
    named(judge(plain, trace_file), "the text-dropped branch gives the conditional velocity at every step")


def test_a_vae_of_the_wrong_scale(plain, trace_file):
    plain.vae.config = replace(plain.vae.config, scale_factor=1.0)
    found = judge(plain, trace_file)
    named(found, "the VAE decodes the recorded latent to another picture")
    named(found, "the VAE encodes picture 0 to")
    assert all(step.rel_l2 == 0 for case in found.report.cases for step in case.steps)


def test_a_layer_left_in_bf16(quantised, reference, trace_file):
    path = "layers.1.gen.down_proj"
    quantised.bagel.get_submodule(path).weight.data = reference.bagel.get_submodule(path).weight.data.clone()
    named(judge(quantised, trace_file, "4-bit", "nf4"), f"{path} is not compressed: the recipe says nf4")


def test_a_saturated_int8_layer(plain, trace_file):
    for path, module in expert_linears(plain.bagel).items():
        module.weight.data = int8(module.weight.data, 0.4 if path == "layers.0.und.up_proj" else 1.0)
    found = judge(plain, trace_file, "8-bit", "int8")
    named(found, "layers.0.und.up_proj is saturated")
    assert len(found.report.faults) == 1


def test_thoughts_missing_from_the_context(plain, trace_file, monkeypatch):
    monkeypatch.setattr(Branches, "add_thoughts", lambda self, texts: None)
    found = judge(plain, trace_file)
    named(found, "the thoughts are missing")
    assert {c.name for c in found.report.cases if c.metrics.get("velocity.path", 0) > 0} == {"think"}


def test_attribution_names_the_component(plain, reference, trace_file):
    for path, module in expert_linears(plain.bagel).items():
        if ".gen." in path and "proj" in path and path.rsplit(".", 1)[1] in ("gate_proj", "up_proj", "down_proj"):
            module.weight.data = nf4(module.weight.data)
    before = {n: p.clone() for n, p in reference.bagel.named_parameters()}
    shares = {s.component: s for s in judge(plain, trace_file, "4-bit", reference=reference).report.shares}
    assert shares["gen MLP"].velocity > 0.01
    assert all(s.velocity == 0 for name, s in shares.items() if name != "gen MLP")
    assert all(torch.equal(p, before[n]) for n, p in reference.bagel.named_parameters())
