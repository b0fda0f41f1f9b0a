"""Miniature data in each official layout, made of nano scenes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from bagel.nano import language
from bagel.nano.scenes import render, sample_scene

NANO = Path(__file__).parents[2] / "bagel_compress" / "data" / "BAGEL-nano"


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write_parquet(path: Path, columns: dict[str, list[object]], rows: int = 4) -> None:
    """A file with row groups of `rows` rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=rows)


def t2i(folder: Path, count: int = 12, seed: int = 1) -> Path:
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(count)]
    captions = [json.dumps({"short": language.caption(s), "long": language.caption(s, rng)}) for s in scenes]
    half = count // 2
    for number, part in enumerate((slice(0, half), slice(half, count))):
        columns: dict[str, list[object]] = {"image": [png(render(s)) for s in scenes[part]], "captions": captions[part]}
        write_parquet(folder / f"{number:05d}.parquet", columns)
    return folder


def edit(folder: Path, count: int = 8, seed: int = 2) -> Path:
    """With parquet_info.json beside; the last row is a chain of three pictures."""
    rng = np.random.default_rng(seed)
    edits = [language.sample_edit(rng, "recolor") for _ in range(count)]
    images = [[png(render(e.before)), png(render(e.after))] for e in edits]
    texts = [[[e.text, e.text]] for e in edits]
    images[-1].append(images[-1][0])
    texts[-1].append(["undo it"])
    write_parquet(folder / "edits.parquet", {"image_list": images, "instruction_list": texts})
    info = {"/somewhere/else/edits.parquet": {"num_row_groups": -(-count // 4), "num_rows": count}}
    (folder / "parquet_info.json").write_text(json.dumps(info))
    return folder


def vlm(folder: Path, count: int = 10, seed: int = 3) -> Path:
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    lines = []
    for i in range(count):
        scene = sample_scene(rng)
        Image.fromarray(render(scene)).save(folder / f"{i}.png")
        question = language.question(scene, "color", rng)
        turns = [{"from": "human", "value": f"<image>\n{question.text}"}, {"from": "gpt", "value": question.answer}]
        lines.append(json.dumps({"image": f"{i}.png", "conversations": turns}))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def captioned(folder: Path, count: int = 8, seed: int = 4) -> Path:
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        scene = sample_scene(rng)
        Image.fromarray(render(scene)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(language.caption(scene))
    return folder
