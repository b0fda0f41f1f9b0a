"""Loss and gradients: of the golden training batch, and of adapters over codes against those over decoded weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bagel.conformance.golden import Golden
from bagel.conformance.parts import recorded_batch
from bagel.layers import linear_dtype
from bagel.loading import put
from bagel.model import Bagel
from bagel.training import DroppedImage, LatentItem, PackedBatch, TextItem, ViTItem, forward, pack
from bagel_compress.build.artifact import Artifact
from bagel_compress.codecs import CODECS
from bagel_compress.codecs.base import Unit
from bagel_compress.codecs.fp8 import Fp8
from bagel_compress.codecs.int8 import Int8
from bagel_compress.codecs.nf4 import Nf4
from bagel_compress.codecs.raw import Raw
from bagel_compress.finetune.config import LoraConfig
from bagel_compress.finetune.lora import LoraLinear, add_adapters
from bagel_compress.finetune.trainee import Network, compute_in
from bagel_compress.io.tensor_spec import TensorSpec
from bagel_compress.run.load import load

STEP, AGREES = 1e-3, 0.01  # of the finite difference along a gradient of length one; set before the first run


@pytest.fixture
def golden_batch(golden: Path) -> tuple[Bagel, PackedBatch, torch.Tensor, dict[str, torch.Tensor]]:
    """The golden model, ready to be trained, and the recorded batch."""
    manifest = json.loads((golden / "manifest.json").read_text())
    opened = Golden.open(golden, manifest, "fp32")
    given = load_file(golden / "traces" / "train.fp32.safetensors")
    model = opened.sampler.bagel.train().requires_grad_(True)
    return model, recorded_batch(opened, manifest["scenarios"]["train"], given), given["noise"], given


def loss_of(model: Bagel, batch: PackedBatch, noise: torch.Tensor, recompute: bool = False) -> torch.Tensor:
    losses = Network(model, recompute)(batch, noise)
    return losses.ce.mean() + losses.mse.mean()


def test_the_golden_batch_has_its_loss_and_a_gradient_that_predicts_it(golden_batch: tuple) -> None:  # type: ignore[type-arg]
    model, batch, noise, given = golden_batch
    loss = loss_of(model, batch, noise)
    wanted = given["ce"].mean() + given["mse"].mean()
    assert abs(loss.item() - wanted.item()) < 1e-4 * abs(wanted.item())
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert {n for n, _ in model.named_parameters()} == gradients.keys()
    model.zero_grad()
    loss_of(model, batch, noise, recompute=True).backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name  # layers that are run again give the same bits
    for part in ("layers.1.und.", "layers.2.gen.", "vit.", "vae2llm.", "time_embedder.", "connector.", "lm_head."):
        chosen = {n: g for n, g in gradients.items() if n.startswith(part)}
        length = torch.cat([g.flatten() for g in chosen.values()]).norm()
        assert _moved(model, batch, noise, chosen, STEP / length) == pytest.approx(length.item(), rel=AGREES), part


@torch.no_grad()
def _moved(
    model: Bagel, batch: PackedBatch, noise: torch.Tensor, along: dict[str, torch.Tensor], step: torch.Tensor
) -> float:
    """Central difference of the loss along a direction; `step` times it has length STEP."""
    ends = []
    for sign in (1, -2):
        for name, direction in along.items():
            model.get_parameter(name).add_(direction, alpha=sign * float(step))
        ends.append(loss_of(model, batch, noise).item())
    for name, direction in along.items():
        model.get_parameter(name).add_(direction, alpha=float(step))
    return (ends[0] - ends[1]) / (2 * STEP)


@pytest.mark.parametrize("codec", [c for c in CODECS if c is not Raw], ids=lambda c: c.name())
def test_gradients_flow_through_every_codec(codec: type) -> None:
    """Two linears one after the other: scratch memory of the first is overwritten by the second."""
    generator = torch.Generator().manual_seed(0)
    made = codec()
    coded, plain = nn.Sequential(), nn.Sequential()
    for index in range(2):
        spec = TensorSpec("BF16", (64, 64), f"language_model.model.layers.{index}.self_attn.q_proj.weight")
        unit = made.units([spec])[0]
        weight = torch.randn(64, 64, generator=generator).bfloat16() * 0.1
        parts = made.encode(unit, {spec.name: weight})
        coded.append(made.linears(Unit(unit.name, (spec,)), parts, {})[spec.name])
        plain.append(nn.Linear(64, 64, bias=False, dtype=torch.bfloat16))
        plain[index].weight.data = made.decode(unit, parts)[spec.name]
    grads = []
    for layers in (coded, plain):
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_(True)
        layers(x).float().square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)  # type: ignore[misc]


@pytest.mark.parametrize("recompute", [False, True])
def test_adapters_over_codes_train_as_over_the_decoded_weights(coded: Artifact, recompute: bool) -> None:
    found = []
    for decode in (False, True):
        sampler = load(coded)
        if decode:
            for name, module in list(sampler.bagel.named_modules()):
                if hasattr(module, "describe"):
                    put(sampler.bagel, name, _decoded(module))
        adapters = add_adapters(sampler.bagel, LoraConfig(rank=3), seed=1)
        generator = torch.Generator().manual_seed(2)
        for adapter in adapters.values():
            adapter.lora_B.data = torch.randn(adapter.lora_B.shape, generator=generator) * 0.1
        batch = pack(sampler.bagel, sampler.text, _samples(sampler.bagel))
        noise = torch.randn(batch.latents.shape, generator=generator)
        loss_of(sampler.bagel, batch, noise, recompute).backward()
        found.append({f"{n}.{h}": getattr(a, h).grad for n, a in adapters.items() for h in ("lora_A", "lora_B")})
    ours, wanted = found
    assert len(ours) == 2 * 3 * 14
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(ours[name], gradient), name


def _decoded(module: nn.Module) -> nn.Linear:
    weight = module.decoded() if hasattr(module, "decoded") else module.weight
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None, dtype=torch.bfloat16)
    linear.weight.data = weight.clone()
    if module.bias is not None:
        linear.bias.data = module.bias.data.clone()
    return linear


def _samples(model: Bagel) -> list[list[TextItem | ViTItem | LatentItem | DroppedImage]]:
    generator = torch.Generator().manual_seed(3)
    latent = torch.randn(model.config.latent_channels, 8, 8, generator=generator)
    seen = torch.rand(3, 28, 28, generator=generator) * 2 - 1
    return [
        [TextItem("a red cat"), LatentItem(latent, 0.3)],
        [ViTItem(seen), TextItem("what is it?"), TextItem("a cat", loss=True)],
    ]


def test_a_dropped_image_takes_its_place_alone(bf16) -> None:  # type: ignore[no-untyped-def]
    model = bf16.bagel
    text = TextItem("a cat")
    kept = pack(model, bf16.text, [[ViTItem(torch.zeros(3, 28, 28)), text]])
    dropped = pack(model, bf16.text, [[DroppedImage(), text]])
    count = len(bf16.text.turn("a cat"))
    assert dropped.positions.tolist() == kept.positions.tolist()[-count:] == list(range(1, count + 1))


def test_an_expert_without_rows_gets_zeros(fp32) -> None:  # type: ignore[no-untyped-def]
    """Several processes reduce the same gradients, whatever is in their batches."""
    model = copy.deepcopy(fp32.bagel).train().requires_grad_(True)
    batch = pack(model, fp32.text, [[TextItem("a cat", loss=True)]])
    losses = forward(model, batch, torch.zeros_like(batch.latents))
    (losses.ce.mean() + losses.mse.sum()).backward()
    tables = {"vit_pos_embed.pos_embed", "latent_pos_embed.pos_embed"}
    missing = {n for n, p in model.named_parameters() if p.grad is None} - tables
    assert missing == set()
    assert not model.layers[0].gen.q_proj.weight.grad.any()


def test_the_adapter_is_the_product_beside_the_linear() -> None:
    generator = torch.Generator().manual_seed(0)
    base = nn.Linear(6, 4)
    adapter = LoraLinear(base, 2, 3.0, 0.0, generator)
    x = torch.randn(5, 6)
    assert torch.equal(adapter(x), base(x))
    adapter.lora_B.data.normal_()
    merged = base.weight + 3.0 * adapter.lora_B @ adapter.lora_A
    assert torch.allclose(adapter(x), nn.functional.linear(x, merged, base.bias), atol=1e-6)


@pytest.mark.parametrize("codec", [Nf4, Int8, Fp8], ids=lambda c: c.name())
def test_a_coded_base_computes_in_fp32_if_asked(codec: type) -> None:
    """`dtype: float32`: codes stay codes, and everything around them is fp32."""
    spec = TensorSpec("BF16", (64, 64), "language_model.model.layers.0.self_attn.q_proj.weight")
    made = codec()
    unit = made.units([spec])[0]
    parts = made.encode(unit, {spec.name: torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()})
    linear = made.linears(Unit(unit.name, (spec,)), parts, {})[spec.name]
    model = nn.Sequential(nn.Linear(64, 64, dtype=torch.bfloat16), linear)
    before = {n: b.clone() for n, b in linear.named_buffers()}
    compute_in(model, torch.float32, "a build")
    assert linear_dtype(linear) == model[0].weight.dtype == torch.float32
    for name, buffer in linear.named_buffers():
        assert buffer.dtype == before[name].dtype, name
        assert torch.equal(buffer.view(torch.uint8), before[name].view(torch.uint8)), name
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = linear(x)
    y.square().sum().backward()
    wanted = nn.functional.linear(x, made.decode(unit, parts)[spec.name].float())
    assert torch.equal(y, wanted)
    assert x.grad is not None
    assert torch.allclose(x.grad, 2 * wanted @ made.decode(unit, parts)[spec.name].float(), rtol=1e-5, atol=1e-4)
