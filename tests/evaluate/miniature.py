"""Miniature data in each benchmark's official layout, with BAGEL-nano's scenes for pictures."""

from __future__ import annotations

import csv
import json
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from bagel.nano.scenes import render, sample_scene


def picture(seed: int) -> Image.Image:
    return Image.fromarray(render(sample_scene(np.random.default_rng(seed), 1)))


def png(seed: int) -> bytes:
    buffer = BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def put(path: Path, content: str | bytes | object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def parquet(path: Path, rows: list[dict[str, object]]) -> None:
    import pyarrow as pa
    from pyarrow import parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def mme(folder: Path) -> Path:
    for task, nested in (("existence", ""), ("code_reasoning", "images/")):
        lines = [f"{i // 2}.png\tIs there a circle?\t{'Yes' if i % 2 else 'No'}" for i in range(4)]
        put(folder / "questions" / f"{task}.txt", "\n".join(lines) + "\n")
        for i in range(2):
            put(folder / "MME_Benchmark_release_version" / task / f"{nested}{i}.png", png(i))
    return folder


def mmvp(folder: Path) -> Path:
    folder.mkdir(parents=True)
    with (folder / "Questions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["Index", "Question", "Options", "Correct Answer"])
        for i in range(1, 5):
            table.writerow([i, "Which shape is it?", "(a) a circle (b) a square", "(a)" if i % 2 else "(b)"])
            put(folder / "MMVP Images" / f"{i}.jpg", png(i))
    return folder


def mmmu(folder: Path) -> Path:
    def row(number: int, kind: str) -> dict[str, object]:
        images = {f"image_{i}": {"bytes": png(i), "path": None} if i <= number else None for i in range(1, 8)}
        options, answer = ("[]", "['circle', 'disc']") if kind == "open" else ("['circle', 'square']", "B")
        return {"id": f"validation_Art_{number}", "question": "Which <image 1>?", "options": options,
                "answer": answer, "question_type": kind, **images}  # fmt: skip

    rows = [row(1, "multiple-choice"), row(2, "multiple-choice"), row(3, "open")]
    parquet(folder / "Art" / "validation-00000-of-00001.parquet", rows)
    return folder


def geneval(folder: Path) -> Path:
    rows = [{"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a red circle"},
            {"tag": "counting", "include": [{"class": "square", "count": 1}], "prompt": "a blue square"}]  # fmt: skip
    put(folder / "evaluation_metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return folder


def wise(folder: Path) -> Path:
    for file, number in (("cultural_common_sense", 1), ("spatio-temporal_reasoning", 401), ("natural_science", 701)):
        rows = [{"Prompt": "a red circle", "Explanation": "a disc", "Category": "c", "Subcategory": "Horizontal time",
                 "prompt_id": number}]  # fmt: skip
        put(folder / f"{file}.json", rows)
    code = "raise SystemExit('never run')\ndef f(d):\n    return f\"\"\"P: {d['Prompt']} E: {d['Explanation']}\"\"\"\n"
    put(folder / "gpt_eval_mp.py", code)
    return folder


def dpg(folder: Path) -> Path:
    put(folder / "0.txt", "a red circle\n")
    return folder


def gedit(folder: Path) -> Path:
    rows: list[dict[str, object]] = [
        {"key": f"k{i}", "task_type": "color_alter", "instruction": "make it blue", "instruction_language": language,
         "input_image": {"bytes": png(i), "path": None}}
        for i, language in enumerate(("en", "cn", "en"))
    ]  # fmt: skip
    parquet(folder / "data" / "train-00000-of-00001.parquet", rows)
    names = ("_context_no_delimit", "_prompts_0shot_two_image_edit_rule", "_prompts_0shot_rule_PQ")
    put(
        folder / "vie_prompts.py",
        "".join(f"{n} = '{n}'\n" for n in names) + "_prompts_0shot_tie_rule_SC = 'do <instruction>'\n",
    )
    return folder


def imgedit(folder: Path) -> Path:
    put(folder / "singleturn" / "style" / "0.png", png(0))
    put(folder / "singleturn" / "singleturn.json", {"7": {"id": "style/0.png", "prompt": "blue", "edit_type": "style"}})
    put(folder / "singleturn" / "judge_prompt.json", {"style": "Rate <edit_prompt>"})
    return folder


def kris(folder: Path) -> Path:
    rows = {"count_change": {"ori_img": "0.png"}, "biology": {"ori_img": "0.png"},
            "temporal_prediction": {"ori_img": ["0.png", "1.png"]},
            "viewpoint_change": {"ori_img": "0.png", "gt_img": "1.png"}}  # fmt: skip
    for category, row in rows.items():
        put(folder / category / "annotation.json", {"1": {**row, "ins_en": "change it", "explain_en": "because"}})
        put(folder / category / "0.png", png(0))
        put(folder / category / "1.png", png(1))
    names = ("consist", "quality", "instruction_following", "dual_evaluation", "view_instruction_following",
             "consist_temporal", "instruction_temporal")  # fmt: skip
    put(folder / "prompts.py", "".join(f'prompt_{n} = """{n} {{instruct}} {{{{"score": 1}}}}"""\n' for n in names))
    return folder


def rise(folder: Path) -> Path:
    rows = [{"index": f"{c}_1", "category": c, "instruction": "next", "image": f"{c}_images/0.png", "reference": "r",
             "reasoning_img": None, **({"reference_txt": "4"} if c == "logical_reasoning" else {})}
            for c in ("temporal_reasoning", "spatial_reasoning", "logical_reasoning")]  # fmt: skip
    put(folder / "datav2_total_w_subtask.json", rows)
    for row in rows:
        put(folder / str(row["image"]), png(0))
    names = ("consist", "reasoning", "generation", "spatial_ref", "spatial_qual", "spatial_cons", "logical_cons_ans",
             "logical_txt")  # fmt: skip
    put(folder / "utils.py", "import os\n" + "".join(f'prompt_{n} = """{n} {{instruct}}"""\n' for n in names))
    return folder


def intelligentbench(folder: Path) -> Path:
    put(folder / "0.png", png(0))
    put(folder / "data.jsonl", json.dumps({"id": "a", "image": "0.png", "prompt": "make it blue"}) + "\n")
    return folder


MAKE = {f.__name__: f for f in (mme, mmvp, mmmu, geneval, wise, dpg, gedit, imgedit, kris, rise, intelligentbench)}
