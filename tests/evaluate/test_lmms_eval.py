"""lmms-eval runs a task of local data through the adapter; needs the package lmms-eval."""

from __future__ import annotations

import json
from pathlib import Path

import miniature
import numpy as np
import pytest

from bagel.nano import language
from bagel.nano.scenes import render, sample_scene
from bagel.settings import TextSettings
from bagel_compress.errors import BenchmarkError
from bagel_compress.evaluate import lmms_adapter
from bagel_compress.evaluate.evaluate import open_any

NANO = Path(__file__).parents[2] / "bagel_compress" / "data" / "BAGEL-nano"
TASK = """
task: bagel_shapes
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/data.jsonl}}
test_split: test
output_type: generate_until
doc_to_visual: !function shapes_utils.visual
doc_to_text: "{{question}}"
doc_to_target: answer
generation_kwargs: {max_new_tokens: 20, temperature: 0, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.slow
def test_a_local_task_runs_through_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = pytest.importorskip("lmms_eval.evaluator")
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.tasks import TaskManager
    from PIL import Image

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    sampler, rows, right = open_any(str(NANO), "cpu", "fp32"), [], []
    for i in range(12):
        rng = np.random.default_rng(i)
        scene = sample_scene(rng, 1)
        picture, asked = Image.fromarray(render(scene)), language.question(scene, language.QUESTIONS[0], rng)
        picture.save(tmp_path / f"{i}.png")
        rows.append({"image": str(tmp_path / f"{i}.png"), "question": asked.text, "answer": asked.answer})
        right.append(sampler.chat([picture], asked.text, TextSettings(20)).text == asked.answer)
    miniature.put(tmp_path / "data.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    miniature.put(tmp_path / "shapes.yaml", TASK.replace("FOLDER", str(tmp_path)))
    reader = "from PIL import Image\ndef visual(doc):\n    return [Image.open(doc['image'])]\n"
    miniature.put(tmp_path / "shapes_utils.py", reader)
    MODEL_REGISTRY_V2.register_manifest(lmms_adapter.manifest(), overwrite=True)
    found = evaluator.simple_evaluate(
        model="bagel_compress", model_args=f"pretrained={NANO},dtype=fp32", tasks=["bagel_shapes"], device="cpu",
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False), batch_size=1,
    )  # fmt: skip
    assert any(right)
    assert found["results"]["bagel_shapes"]["exact_match,none"] == pytest.approx(np.mean(right))
    with pytest.raises(BenchmarkError, match="takes pretrained, device and dtype"):
        lmms_adapter.BagelCompress(str(NANO), lora="x")


def test_the_module_has_nothing_else() -> None:
    with pytest.raises(AttributeError, match="no attribute Other"):
        _ = lmms_adapter.Other
