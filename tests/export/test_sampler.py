"""The sampler on ONNX Runtime against the torch sampler, in all modes, in a process that cannot import torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bagel.events import Listener, Step
from bagel.sampler import FlowSettings, Request, Sampler, TextSettings
from bagel_compress.exporting.manifest import ExportFolder
from bagel_compress.exporting.ort_arrays import Generator, grid_ids, schedule
from bagel_compress.exporting.ort_sampler import open_onnx

RELATIVE = 1e-4  # of velocities and logits
PIXELS = 1.0  # mean absolute error of images, of 255
EDIT = {"num_timesteps": 4, "cfg_img_scale": 2.0, "cfg_interval": [0.0, 1.0], "cfg_renorm_type": "text_channel"}
SKY, WHAT = "Change the sky to night and add a small star.", "What is in the picture, and why is it blue?"
CASES: dict[str, dict[str, Any]] = {
    "t2i": {"turns": ["a red cat"], "size": [64, 96], "flow": {"num_timesteps": 6}},
    "t2i_channel": {"turns": ["a cat"], "size": [48, 48], "flow": {"num_timesteps": 4, "cfg_renorm_type": "channel"}},
    "t2i_fast": {
        "turns": ["a red cat"],
        "size": [64, 64],
        "flow": {"num_timesteps": 9, "solver": "ab2", "cache_every": 2, "cache_order": 2},
    },
    "t2i_heun": {"turns": ["a red cat"], "size": [64, 64], "flow": {"num_timesteps": 5, "solver": "heun"}},
    "edit_fast": {
        "turns": ["@img_a.png", SKY],
        "flow": EDIT | {"num_timesteps": 9, "solver": "dpm2", "cache_threshold": 0.2, "guidance_every": 2},
    },
    "t2i_think": {"turns": ["a red cat"], "size": [64, 64], "think": True, "flow": {"num_timesteps": 4}, "tokens": 12},
    "edit": {"turns": ["@img_a.png", SKY], "flow": EDIT},
    "edit_two": {"turns": ["@img_a.png", "@img_b.png", SKY], "flow": EDIT},
    "edit_think": {"turns": ["@img_b.png", SKY], "think": True, "flow": EDIT, "tokens": 8},
    "understand": {"turns": ["@img_a.png", WHAT], "output": "text", "tokens": 12},
    "understand_think": {"turns": ["@img_b.png", WHAT], "output": "text", "think": True, "tokens": 10},
    "chat": {"turns": ["man why"], "output": "text", "tokens": 40},
}
# Runs every case on the exported graphs; torch cannot be imported there.
CHILD = """
import sys
sys.modules["torch"] = None
import json
import numpy as np
from pathlib import Path
from PIL import Image
from bagel.events import Listener
from bagel.settings import FlowSettings, TextSettings
from bagel_compress.exporting.ort_sampler import open_onnx

class Velocities(Listener):
    def __init__(self):
        self.seen = []

    def after_step(self, step):
        self.seen.append(step.v)
        return step

folder, cases, pictures, out = sys.argv[1:]
sampler, found, texts = open_onnx(folder, threads=1), {}, {}
for name, case in json.loads(cases).items():
    turns = [Image.open(Path(pictures) / t[1:]) if t.startswith("@") else t for t in case["turns"]]
    flow = dict(case.get("flow", {}))
    if "cfg_interval" in flow:
        flow["cfg_interval"] = tuple(flow["cfg_interval"])
    listener = Velocities()
    result = sampler.run(
        turns, output=case.get("output", "image"), think=case.get("think", False), size=case.get("size"),
        flow=FlowSettings(**flow), text=TextSettings(max_tokens=case.get("tokens", 16)), seed=7,
        listener=listener,
    )
    texts[name] = [result.text, result.ids]
    if listener.seen:
        found |= {f"{name}.v": np.stack(listener.seen), f"{name}.image": np.asarray(result.image)}
assert sys.modules["torch"] is None
np.savez(out, **found)
Path(out).with_suffix(".json").write_text(json.dumps(texts))
"""


class Velocities(Listener):
    """The guided velocity of every step."""

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []

    def after_step(self, step: Step) -> Step:
        self.seen.append(step.v.numpy())
        return step


@pytest.fixture(scope="module")
def ran(exported: ExportFolder, golden: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    out = tmp_path_factory.mktemp("ran") / "found.npz"
    argv = [str(exported.path), json.dumps(CASES), str(golden / "traces"), str(out)]
    subprocess.run([sys.executable, "-c", CHILD, *argv], check=True)
    return np.load(out), json.loads(out.with_suffix(".json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_every_mode_equals_torch(name: str, ran: tuple[Any, Any], fp32: Sampler, golden: Path) -> None:
    found, texts = ran
    case, listener = CASES[name], Velocities()
    flow = dict(case.get("flow", {}))
    if "cfg_interval" in flow:
        flow["cfg_interval"] = tuple(flow["cfg_interval"])
    wanted = fp32.run(
        [Image.open(golden / "traces" / t[1:]) if t.startswith("@") else t for t in case["turns"]],
        output=case.get("output", "image"),
        think=case.get("think", False),
        size=case.get("size"),
        flow=FlowSettings(**flow),
        text=TextSettings(max_tokens=case.get("tokens", 16)),
        seed=7,
        listener=listener,
    )
    assert texts[name] == [wanted.text, wanted.ids]
    if listener.seen:
        for mine, torchs in zip(found[f"{name}.v"], listener.seen, strict=True):
            assert relative(mine, torchs) <= RELATIVE
        difference = found[f"{name}.image"].astype(int) - np.asarray(wanted.image).astype(int)
        assert np.abs(difference).mean() <= PIXELS


def test_logits_equal_torch(exported: ExportFolder, fp32: Sampler) -> None:
    mine = open_onnx(exported.path, threads=1)
    ours, torchs = [mine.bagel.new_context()], [fp32.bagel.new_context()]
    turn = fp32.text.turn("a red cat sits on the old house")
    mine.bagel.prefill_text(ours, [turn])
    fp32.bagel.prefill_text(torchs, [turn])
    for token in (fp32.text.bos, 5, 77, 130):
        logits = mine.bagel.next_logits(ours, [token])
        assert relative(logits, fp32.bagel.next_logits(torchs, [token]).numpy()) <= RELATIVE
    assert (ours[0].length, ours[0].rope) == (torchs[0].length, torchs[0].rope)


def test_a_batch_gives_what_single_runs_give(exported: ExportFolder) -> None:
    sampler = open_onnx(exported.path, threads=1)
    flow = FlowSettings(num_timesteps=3, cfg_renorm_type="channel")
    requests = [Request(["a red cat"], (32, 48), seed=1), Request(["a cat"], (48, 32), seed=2)]
    for request, found in zip(requests, sampler.run_batch(requests, flow=flow), strict=True):
        alone = sampler.run(request.turns, size=request.size, flow=flow, seed=request.seed)
        np.testing.assert_array_equal(found.latent, alone.latent)


def test_a_fork_does_not_change_its_origin(exported: ExportFolder) -> None:
    model = open_onnx(exported.path, threads=1).bagel
    context = model.new_context()
    model.prefill_text([context], [[1, 2, 3]])
    before = model.next_logits([context.fork()], [4])
    model.prefill_text([context.fork()], [[9, 9]])
    np.testing.assert_array_equal(model.next_logits([context.fork()], [4]), before)
    assert context.length == 3


def test_seeds_mean_the_same_noise() -> None:
    for seed, shape in ((0, (64, 64)), (123456789, (3, 17)), (7, (1, 16, 9, 11))):
        wanted = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).numpy()
        np.testing.assert_allclose(Generator(seed).normal(shape), wanted, rtol=1e-4, atol=1e-6)


def test_schedule_and_positions_are_those_of_torch() -> None:
    from bagel import flow, inputs

    for count, shift in ((2, 1.0), (24, 3.0), (50, 3.0), (51, 1.7)):
        np.testing.assert_allclose(schedule(count, shift), flow.schedule(count, shift).numpy(), rtol=2e-7)
    for arguments in ((3, 5, 8, False), (3, 5, 8, True), (7, 2, 70, True)):
        np.testing.assert_array_equal(grid_ids(*arguments), inputs.grid_ids(*arguments).numpy())


def test_sampled_text_is_reproducible(exported: ExportFolder) -> None:
    sampler = open_onnx(exported.path, threads=1)
    warm = TextSettings(max_tokens=8, do_sample=True, temperature=1.0)
    first, again, other = (sampler.run(["man why"], output="text", text=warm, seed=s).ids for s in (3, 3, 4))
    assert first == again
    assert first != other


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
