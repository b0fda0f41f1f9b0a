"""A benchmark of somebody else: the example of docs/nano.md runs as it is printed, and counts right and wrong."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bagel_compress.cli import main
from bagel_compress.errors import TargetError
from bagel_compress.scores.external_benchmark import load_benchmark

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "bagel_compress" / "data" / "BAGEL-nano"
DETECTOR = """
import numpy as np
from bagel.nano.detector import read

def detect(image):
    return [thing.shape for thing in read(np.asarray(image)).things]
"""
ASKED = (
    {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a red circle"},
    {"tag": "two_object", "include": [{"class": "circle", "count": 1}, {"class": "square", "count": 1}],
     "prompt": "a red circle left of a blue square on a white background"},
    {"tag": "two_object", "include": [{"class": "triangle", "count": 1}], "prompt": "a blue square"},
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    yield tmp_path
    for name in set(sys.modules) - before:
        if name in ("geneval", "my_detector", "odd"):
            del sys.modules[name]


def test_the_documented_example_counts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = re.search(r"```python\n(# geneval.py.*?)```", (ROOT / "docs" / "nano.md").read_text(), re.DOTALL)
    assert found
    (folder / "geneval.py").write_text(found[1].replace("size=(1024, 1024)", "size=(32, 32)"))
    (folder / "my_detector.py").write_text(DETECTOR)
    (folder / "evaluation_metadata.jsonl").write_text("\n".join(json.dumps(entry) for entry in ASKED))
    assert main(["score", str(CHECKPOINT), "--benchmark", "geneval:benchmark", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["benchmark"], result["prompts"]) == ("geneval", 3)
    scores = {name: row["score"] for name, row in result["scores"].items()}
    assert scores == {"single_object": 1.0, "two_object": 0.5, "all": pytest.approx(2 / 3)}


def test_what_is_no_benchmark_is_said_in_one_sentence(folder: Path) -> None:
    (folder / "odd.py").write_text("def benchmark():\n    return 3\n")
    for name, message in (
        ("odd", "MODULE:FUNCTION"),
        ("missing_module:benchmark", "no module named missing_module"),
        ("odd:other", "no function other"),
        ("odd:benchmark", "returned int"),
    ):
        with pytest.raises(TargetError, match=message):
            load_benchmark(name)
