"""The rows of a calibration are those that the sampler's own passes have, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bagel.context import Context
from bagel.sampler import Sampler
from bagel.settings import FlowSettings
from bagel_compress.calibrate.calibration_set import (
    CalibrationSet,
    CleanLatent,
    DecodedText,
    ImagePass,
    NoisedLatent,
    TextPass,
)
from bagel_compress.calibrate.first_rows import first_rows
from bagel_compress.calibrate.layer_run import LayerRun, Stream
from bagel_compress.calibrate.layout import Layout, Pass, lay_out
from bagel_compress.calibrate.make_set import make_set
from bagel_compress.calibrate.moments import Moments
from bagel_compress.calibrate.prompts import Asked, Job, Kind
from bagel_compress.io.packaged import resource
from bagel_compress.source.checkpoint import Checkpoint

FLOW = FlowSettings(12, 2.0, 3.0, 1.3, (0.0, 1.0), 0.0, "text_channel")
CPU = torch.device("cpu")


def job(name: str, kind: Kind, prompt: str, picture: str = "") -> Job:
    asked = Asked(prompt=prompt, picture=picture)
    return Job(name=name, kind=kind, asked=asked, size=(32, 32), times=2, max_tokens=24, flow=FLOW)


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler.from_dir(resource("BAGEL-nano"), dtype=torch.float32)


@pytest.fixture(scope="module")
def calibration(sampler: Sampler, tmp_path_factory: pytest.TempPathFactory) -> CalibrationSet:
    jobs = [
        job("one", "drawing", "a yellow square on the left on a gray background"),
        job("plan", "plan", "a green circle"),
        job("change", "edit", "make the square purple", "one"),
        job("ask", "question", "describe the picture.", "one"),
        job("chat", "question", "what color is the circle?"),
    ]
    return make_set(sampler, ("nano", "digest"), jobs, tmp_path_factory.mktemp("set") / "set.safetensors")


def rows_of(calibration: CalibrationSet, layout: Layout, sampler: Sampler) -> Tensor:
    checkpoint = Checkpoint.open(resource("BAGEL-nano"))
    specs = {spec.name: spec for spec in checkpoint.specs}
    return first_rows(
        calibration, layout, sampler.bagel.config, specs, checkpoint, sampler.wrap, CPU, torch.float32, torch.float32
    )


def run(calibration: CalibrationSet, layout: Layout, sampler: Sampler, rows: Tensor) -> list[Tensor]:
    """The rows after each layer."""
    states, stream = [], Stream(rows)
    layers = LayerRun(layout, sampler.bagel.config, CPU, torch.float32)
    for layer in range(sampler.bagel.config.llm.num_layers):
        layers.run(layer, sampler.bagel.get_parameter, [stream], None)
        states.append(stream.rows.clone())
    return states


def sampled(calibration: CalibrationSet, passes: Sequence[Pass], sampler: Sampler) -> list[dict[str, Tensor]]:
    """What the sampler's passes give for a sequence: states after each layer, velocities, logits."""
    model, context = sampler.bagel, [sampler.bagel.new_context()]
    before: list[list[Context]] = [[c.fork() for c in context]]
    found = []
    for p in passes:
        seen: dict[str, Tensor] = {}
        tap = seen.__setitem__
        item, at = p.item, [c.fork() for c in before[p.sees]]
        if isinstance(item, TextPass):
            model.prefill_text(at, [item.ids], tap)
        elif isinstance(item, ImagePass):
            pixels = (calibration.picture(item.picture).permute(2, 0, 1).float() / 255 - 0.5) / 0.5
            model.prefill_vit(at, [pixels], sampler.wrap, tap)
        elif isinstance(item, CleanLatent):
            latent = calibration.latent(item.latent)
            rows, cols, _ = latent.shape
            model.prefill_latent(at, [model.unpack_latent(latent.flatten(0, 1).float(), rows, cols)], sampler.wrap, tap)
        elif isinstance(item, NoisedLatent):
            latent = calibration.latent(item.latent)
            block = model.noisy_block(
                latent.flatten(0, 1), torch.tensor(item.time), [tuple(latent.shape[:2])], sampler.wrap
            )
            seen["velocity"] = model.velocity(block, at, tap)
        else:
            assert isinstance(item, DecodedText)
            seen["logits"] = torch.cat([model.next_logits(at, [token]) for token in item.ids])
        if p.on_trunk:
            before.append(at)
        found.append(seen)
    return found


def test_rows_are_those_of_the_samplers_passes(calibration: CalibrationSet, sampler: Sampler) -> None:
    layout = lay_out(calibration)
    first = rows_of(calibration, layout, sampler)
    states = run(calibration, layout, sampler, first.clone())
    kinds = set()
    for passes in layout.sequences:
        for p, seen in zip(passes, sampled(calibration, passes, sampler), strict=True):
            kinds.add(p.item.kind)
            for layer, state in enumerate(states):
                if f"layer{layer}" in seen:
                    torch.testing.assert_close(state[p.rows], seen[f"layer{layer}"], rtol=2e-4, atol=2e-4)
            if "velocity" in seen:
                inside = states[-1][p.rows[1:-1]]
                velocity = sampler.bagel.llm2vae(sampler.bagel.norm_gen(inside))
                torch.testing.assert_close(velocity, seen["velocity"], rtol=2e-4, atol=2e-4)
            if "logits" in seen:
                logits = sampler.bagel.lm_head(sampler.bagel.norm_und(states[-1][p.rows]))
                torch.testing.assert_close(logits, seen["logits"], rtol=2e-4, atol=2e-4)
    assert kinds == {"words", "seen", "clean", "noised", "decoded"}


def test_rows_are_counted_and_each_lies_at_one_place(calibration: CalibrationSet) -> None:
    layout, counted = lay_out(calibration), calibration.rows
    taken = torch.cat([p.rows for p in layout.passes])
    assert taken.sort().values.tolist() == list(range(counted.und + counted.gen))
    read = layout.read_rows()
    assert int(read[: layout.und].sum()) == counted.read_und
    assert int(read[layout.und :].sum()) == counted.read_gen


class _Keeps:
    """A rounder that keeps the moments and changes nothing."""

    refit = False

    def __init__(self) -> None:
        self.moments: dict[str, Moments] = {}

    def wants(self, path: str) -> bool:
        return True

    def take(self, paths: Sequence[str], moments: Moments) -> dict[str, Tensor]:
        self.moments |= dict.fromkeys(paths, moments)
        return {}


def test_moments_are_those_of_the_linears_inputs(calibration: CalibrationSet, sampler: Sampler) -> None:
    layout = lay_out(calibration)
    rows = rows_of(calibration, layout, sampler)
    keeps, layers = _Keeps(), LayerRun(layout, sampler.bagel.config, CPU, torch.float32)
    expert = sampler.bagel.layers[0].gen
    x = expert.input_layernorm(rows[layout.und :])
    last = sampler.bagel.config.llm.num_layers - 1
    stream = Stream(rows)
    for layer in range(last + 1):
        layers.run(layer, sampler.bagel.get_parameter, [stream], keeps)
    assert len(keeps.moments) == (last + 1) * 2 * 7
    [block] = keeps.moments["layers.0.gen.v_proj.weight"].blocks()
    torch.testing.assert_close(block.h, x.T @ x, rtol=1e-4, atol=1e-2)
    counted = calibration.rows
    assert keeps.moments[f"layers.{last}.und.k_proj.weight"].rows == counted.und
    assert keeps.moments[f"layers.{last}.und.q_proj.weight"].rows == counted.read_und
    assert keeps.moments[f"layers.{last}.gen.down_proj.weight"].rows == counted.read_gen
    assert keeps.moments[f"layers.{last - 1}.gen.down_proj.weight"].rows == counted.gen


def test_bf16_rows_stay_near(calibration: CalibrationSet, sampler: Sampler) -> None:
    """Rows are kept in bf16 between layers; the model's own passes in bf16 are as far off."""
    layout = lay_out(calibration)
    exact = run(calibration, layout, sampler, rows_of(calibration, layout, sampler))[-1]
    first = rows_of(calibration, layout, sampler).bfloat16()
    rounded = run(calibration, layout, sampler, first)[-1].float()
    assert float((rounded - exact).norm() / exact.norm()) < 0.02


def test_a_set_of_given_pictures_needs_no_weights(tmp_path: Path, sampler: Sampler) -> None:
    from PIL import Image

    from bagel.loading import unfilled
    from bagel.model import Bagel

    with unfilled():
        empty = Bagel(sampler.bagel.config)
    Image.new("RGB", (40, 50), (200, 30, 30)).save(tmp_path / "a.png")
    answered = Asked(prompt="describe the picture.", picture="one", answer="a red circle")
    jobs = [job("one", "drawing", "a red circle"), job("change", "edit", "remove the circle", "one")]
    jobs += [Job(name="ask", kind="question", asked=answered, size=(32, 32), times=2, max_tokens=24, flow=FLOW)]
    found = make_set(
        Sampler(empty, sampler.vae, sampler.text), ("nano", "digest"), jobs, tmp_path / "set", [tmp_path / "a.png"]
    )
    assert found.header.latents == "pictures"
    names = [reading.name for reading in found.header.sequences]
    assert names == ["one", "change", "change.image_dropped", "ask"]
    kinds = [[event.kind for event in reading.trunk] for reading in found.header.sequences]
    assert kinds == [["words"], ["clean", "seen", "words"], ["words"], ["seen", "words"]]
    decoded = found.header.sequences[-1].branches[0]
    assert isinstance(decoded, DecodedText)
    assert sampler.text.decode(decoded.ids[1:]) == "a red circle"
