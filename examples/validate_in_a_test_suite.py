"""Hold a build against its source in your own test-suite.

    python -m pytest examples/validate_in_a_test_suite.py

The fixtures here compress and trace the small model that comes with the package. In a real suite both exist already:
the build is a folder that `compress` wrote, and the trace was recorded once, on a machine that holds the full model.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

import bagel_compress as bc

NANO = Path(bc.__file__).parent / "data" / "BAGEL-nano"
# One case of each task that an 8-bit build answers for: the gate does not pass without them. Cases for the
# released model: exports/cases.
FLOW = """
flow: {num_timesteps: 12, timestep_shift: 2.0, cfg_text_scale: 3.0, cfg_interval: [0.0, 1.0], cfg_renorm_min: 1.0}
record: {steps: 4, logits: 16}
"""
DRAW = "name: draw\nkind: t2i\nturns: [a yellow triangle at the top on a pink background]\nsize: [32, 32]" + FLOW
EDIT = "name: edit\nkind: edit\nturns: [{image: square.png}, make the square green]" + FLOW
ASK = "name: ask\nkind: understand\nturns: [{image: square.png}, describe the picture.]\ntext: {max_tokens: 24}"
THINK = (
    "name: think\nkind: t2i\nthink: true\nturns: [an orange circle and a blue triangle]\nsize: [32, 32]\n"
    "text: {max_tokens: 24}" + FLOW
)
CARD = bc.Target.model_validate(
    {
        "name": "small-card",
        "device": {"name": "a card of 1 GB", "memory_mib": 1024},
        "sizes": {"image": [32, 32], "input_image": [32, 32], "think_tokens": 16, "answer_tokens": 16},
        "tasks": ["t2i", "understand"],
    }
)


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> bc.Artifact:
    checkpoint = bc.Checkpoint.open(NANO)
    plan = bc.make_plan(checkpoint, bc.Recipe.load("int8-24gb"))
    return bc.compress(plan, checkpoint, tmp_path_factory.mktemp("build") / "int8")


@pytest.fixture(scope="session")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trace")
    square = Image.new("RGB", (32, 32), "white")
    square.paste((220, 40, 40), (8, 8, 22, 22))
    square.save(folder / "square.png")
    for name, case in {"draw": DRAW, "edit": EDIT, "ask": ASK, "think": THINK}.items():
        (folder / f"{name}.yaml").write_text(case, encoding="utf-8")
    return bc.trace(NANO, [folder], folder / "nano.trace.safetensors").path


def test_every_byte_is_what_the_manifest_says(build: bc.Artifact) -> None:
    assert build.verify() == []


def test_the_build_draws_what_its_source_draws(build: bc.Artifact, trace: Path) -> None:
    bc.validate(build, [trace]).require()  # raises GateError with a sentence per broken limit


def test_it_fits_the_card(build: bc.Artifact) -> None:
    report = bc.budget(build, CARD)
    assert report.broken == []
    assert report.peak < 1024 * 2**20  # bytes, the worst phase
