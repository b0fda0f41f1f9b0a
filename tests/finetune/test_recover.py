"""Repair by distillation: what the lessons want, that a build comes nearer to it, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bagel_compress as bc
from bagel.sampler import Sampler
from bagel_compress.build.artifact import Artifact
from bagel_compress.calibrate.calibration_set import CalibrationSet, DecodedText, NoisedLatent, TextPass
from bagel_compress.errors import FinetuneError
from bagel_compress.finetune.config import FinetuneConfig
from bagel_compress.finetune.loop import Trainer
from bagel_compress.finetune.processes import Processes
from bagel_compress.finetune.recover import answers, lessons_of, open_repair
from bagel_compress.io.packaged import resource

TINY = Path(__file__).parents[1] / "data" / "golden" / "checkpoint"
NANO = resource("BAGEL-nano")
SET = resource("calibration") / "tiny.safetensors"
NEARER = 0.8  # of the first distance, after a few dozen steps; set before the first run


def config(build: Artifact, **more: Any) -> FinetuneConfig:
    settings = {
        "model": str(build.path), "steps": 24, "tokens": 1200, "lr": 1e-2, "lora": {"rank": 4, "alpha": 4},
        "recover": {"reference": str(TINY), "calibration": str(SET)}, "recompute": False, "save_every": 12,
    }  # fmt: skip
    return FinetuneConfig.model_validate(settings | more)


def run(made: FinetuneConfig, out: Path, stop: int | None = None) -> list[dict[str, float]]:
    trainee, lessons = open_repair(made, Processes())
    found = []
    for result in Trainer(trainee, made, out, Processes(), lessons).steps():
        found.append({k: v for k, v in result.metrics.items() if k != "seconds"})
        if result.step == stop:
            break
    return found


def test_the_lessons_are_what_the_sampler_computes(fp32: Sampler) -> None:
    """The first noised picture after a text, through the sampler's own passes instead of the packed forward."""
    calibration = CalibrationSet.open(SET)
    lessons = lessons_of(calibration, fp32, 1200)
    branches = [b for s in calibration.header.sequences for b in s.branches]
    noised = [b for b in branches if isinstance(b, NoisedLatent)]
    assert sum(len(lesson.batch.mse_rows) for lesson in lessons) == sum(
        math.prod(calibration.shapes[f"latent/{b.latent}"][:2]) for b in noised
    )
    assert sum(len(lesson.batch.ce_rows) for lesson in lessons) == sum(
        len(b.ids) - 1 for b in branches if isinstance(b, DecodedText)
    )
    sequence = calibration.header.sequences[0]
    assert all(isinstance(event, TextPass) for event in sequence.trunk)
    for after in sorted({branch.after for branch in sequence.branches}):
        first = next(b for b in sequence.branches if b.after == after)
        assert isinstance(first, NoisedLatent)
        _check(fp32, calibration, sequence, first, lessons)


def _check(fp32: Sampler, calibration: CalibrationSet, sequence: Any, first: NoisedLatent, lessons: list[Any]) -> None:
    """The velocity of a branch, after its own part of the trunk, is that of one of the lessons."""
    bagel = fp32.bagel
    context = bagel.new_context()
    for event in sequence.trunk[: first.after]:
        bagel.prefill_text([context], [list(event.ids)])
    rows, cols, width = calibration.shapes[f"latent/{first.latent}"]
    latent = calibration.latent(first.latent).float().reshape(-1, width)
    wrap = (fp32.text.image_start, fp32.text.image_end)
    block = bagel.noisy_block(latent, torch.tensor([first.time]), [(rows, cols)], wrap)
    wanted = bagel.velocity(block, [context])
    found = [
        answers(bagel, lesson.batch, False)[0][row : row + rows * cols]
        for lesson in lessons
        for row in _rows_of(lesson, latent)
    ]
    assert any(torch.allclose(one, wanted, rtol=1e-4, atol=1e-4) for one in found)


def test_a_build_comes_nearer_to_its_reference_and_a_killed_run_goes_on(coded: Artifact, tmp_path: Path) -> None:
    made = config(coded)
    straight = run(made, tmp_path / "a")
    before, after = (sum(line["loss"] for line in part) for part in (straight[:3], straight[-3:]))
    assert after < NEARER * before
    run(made, tmp_path / "b", stop=16)
    assert run(made, tmp_path / "b") == straight[12:]
    _, lessons = open_repair(made, Processes())
    plain, repaired = (
        _distance(model, lessons)
        for model in (bc.open_model(coded.path), bc.open_model(coded.path, adapter=tmp_path / "a" / "0000024"))
    )
    assert 0 < repaired < NEARER * plain


@torch.no_grad()
def _distance(model: Any, lessons: list[Any]) -> float:
    """Mean square of what velocities are off, as a share of the wanted ones'."""
    model.bagel.config = replace(model.bagel.config, timestep_shift=1.0)
    off = [answers(model.bagel, lesson.batch, False)[0].float() - lesson.velocity for lesson in lessons]
    return float(torch.cat([part.flatten() for part in off]).square().mean() / lessons[0].power)


def test_the_verb_repairs_and_generate_runs_it(
    cli: Callable[..., tuple[int, str, str]], coded: Artifact, tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(f"model: {coded.path}\nsteps: 1\ntokens: 1200\nlora: {{rank: 1}}\n")
    asked = ("finetune", tmp_path / "r.yaml", "--out", tmp_path / "run")
    code, out, err = cli(*asked, "--recover", TINY, "--json")
    assert code == 0, err
    folder = json.loads(out)["folder"]
    code, _, err = cli(
        "generate",
        coded.path,
        "a cat",
        "--adapter",
        folder,
        "--size",
        "32x32",
        "--steps",
        "3",
        "--out",
        tmp_path / "a.png",
    )
    assert code == 0, err
    code, _, err = cli(*asked, "--recover", NANO)
    assert (code, "give the checkpoint that it was made of" in err) == (2, True)
    code, _, err = cli(*asked, "--calibration", SET)
    assert (code, "--calibration goes with --recover SRC" in err) == (2, True)
    code, _, err = cli("generate", coded.path, "a cat", "--adapter", folder, "--target", "12gb")
    assert (code, "without a residency plan" in err) == (2, True)


def test_what_cannot_be_repaired(coded: Artifact, tmp_path: Path) -> None:
    for more, says in (
        ({"model": str(TINY)}, "no compressed artifact"),
        ({"tokens": 8}, "tokens long, a packed batch holds 8; raise tokens"),
    ):
        with pytest.raises(FinetuneError, match=says):
            run(config(coded, **more), tmp_path)
    plain = config(coded).model_copy(update={"recover": None, "lora": None})
    with pytest.raises(FinetuneError, match="needs a lora and takes no data"):
        plain.with_recover(config(coded).recover)  # type: ignore[arg-type]


def _rows_of(lesson: Any, latent: torch.Tensor) -> list[int]:
    """Where a noised latent begins among the noised rows of a lesson: guidance branches have the same one."""
    noised = lesson.batch.latents[torch.searchsorted(lesson.batch.latent_rows, lesson.batch.mse_rows)]
    return [row for row in range(len(noised) - len(latent) + 1) if torch.equal(noised[row : row + len(latent)], latent)]
