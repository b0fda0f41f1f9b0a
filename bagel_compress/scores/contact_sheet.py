"""Draws the contact sheet of a benchmark: one tile per picture, with a green frame if it is right, else a red one."""

from __future__ import annotations

from PIL import Image

from bagel_compress.scores.benchmark import Benchmark, Scores

TILE, FRAME, GAP = 96, 3, 4
RIGHT, WRONG = (60, 160, 75), (205, 55, 45)


def contact_sheet(benchmark: Benchmark, scores: Scores, columns: int = 12, per_kind: int = 24) -> Image.Image:
    """The first `per_kind` pictures of every kind of prompt; an edit's tile shows its input beside its result."""
    rows: list[list[Image.Image]] = []
    for kind in dict.fromkeys(p.kind for p in benchmark.prompts):
        tiles = [
            _tile(benchmark, scores, index)
            for index, prompt in enumerate(benchmark.prompts)
            if prompt.kind == kind and scores.answers[index].image is not None
        ][:per_kind]
        across = columns // 2 if tiles and tiles[0].width > TILE + 2 * FRAME else columns
        rows += [tiles[start : start + across] for start in range(0, len(tiles), across)]
    width = columns * (TILE + 2 * FRAME + GAP) + GAP
    height = len(rows) * (TILE + 2 * FRAME + GAP) + GAP
    sheet = Image.new("RGB", (width, height), "white")
    for number, row in enumerate(rows):
        x = GAP
        for tile in row:
            sheet.paste(tile, (x, GAP + number * (TILE + 2 * FRAME + GAP)))
            x += tile.width + GAP
    return sheet


def _tile(benchmark: Benchmark, scores: Scores, index: int) -> Image.Image:
    prompt, answer = benchmark.prompts[index], scores.answers[index]
    inputs = [turn for turn in prompt.turns if isinstance(turn, Image.Image)]
    shown = [*inputs, *([answer.image] if answer.image else [])]
    width = TILE if len(shown) == 1 else 2 * (TILE + FRAME) + GAP
    right = min(benchmark.score(prompt, answer).values()) == 1.0
    tile = Image.new("RGB", (width + 2 * FRAME, TILE + 2 * FRAME), RIGHT if right else WRONG)
    for number, image in enumerate(shown):
        x = FRAME if number == 0 else width + FRAME - TILE
        tile.paste(image.resize((TILE, TILE), Image.Resampling.NEAREST), (x, FRAME))
    return tile
