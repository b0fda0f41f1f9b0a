"""The nano world: scenes are deterministic, the detector reads clean renders without error, questions are fair."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from bagel.inputs import THINK_IMAGE, TextCodec
from bagel.nano import language
from bagel.nano.detector import DetectedScene, read
from bagel.nano.scenes import BACKGROUNDS, COLORS, SIDE, Scene, render, sample_scene
from bagel_compress.nano_training import tokens
from bagel_compress.nano_training.batches import EDIT_TURNS


def shown(scene: Scene) -> tuple:
    return scene.background, sorted((t.shape, t.color, t.place) for t in scene.things)


def seen(reading: DetectedScene) -> tuple:
    return reading.background, sorted((t.shape, t.color, t.place) for t in reading.things)


def test_detector_reads_1000_clean_renders_without_error() -> None:
    rng = np.random.default_rng(11)
    scenes = [sample_scene(rng) for _ in range(1000)]
    wrong = [s for s in scenes if seen(read(render(s))) != shown(s)]
    assert wrong == []


def test_detector_sees_what_is_wrong() -> None:
    rng = np.random.default_rng(12)
    scene = sample_scene(rng, 1)
    other = sample_scene(rng, 2)
    assert seen(read(render(scene))) != shown(other)
    noise = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    assert all(t.shape == "?" for t in read(noise).things)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_a_square_that_fills_most_of_the_picture_is_a_square(background: str) -> None:
    image = np.full((SIDE, SIDE, 3), BACKGROUNDS[background], np.uint8)
    image[3:-3, 3:-3] = COLORS["red"]
    assert seen(read(image)) == (background, [("square", "red", "center")])


def test_a_blob_is_no_shape() -> None:
    image = np.full((SIDE, SIDE, 3), 245, np.uint8)
    image[4:28, 14:18] = (220, 40, 40)  # a bar
    assert [t.shape for t in read(image).things] == ["?"]


def test_scenes_and_renders_repeat() -> None:
    first, second = (render(sample_scene(np.random.default_rng(5))) for _ in range(2))
    assert (first == second).all()


def test_no_constant_answer_beats_chance() -> None:
    rng = np.random.default_rng(13)
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for _ in range(6000):
        scene = sample_scene(rng)
        for kind in language.kinds_for(scene):
            answers[kind][language.question(scene, kind, rng).answer] += 1
    for kind, counts in answers.items():
        assert counts.most_common(1)[0][1] / counts.total() < language.CHANCE[kind] + 0.03, kind


@pytest.mark.parametrize("kind", language.EDITS)
def test_edits_change_the_picture(kind: str) -> None:
    rng = np.random.default_rng(14)
    for _ in range(50):
        edit = language.sample_edit(rng, kind)
        assert shown(edit.before) != shown(edit.after)
        assert seen(read(render(edit.after))) == shown(edit.after)


def test_the_pool_recolours_one_of_two_things_and_no_other() -> None:
    kinds = Counter(EDIT_TURNS)
    assert {kind for kind, _ in kinds} == set(language.EDITS)
    assert kinds["recolor", 2] >= 0.4 * kinds.total()
    rng = np.random.default_rng(16)
    for _ in range(50):
        edit = language.sample_edit(rng, "recolor", 2)
        changed = [(a, b) for a, b in zip(edit.before.things, edit.after.things, strict=True) if a != b]
        assert len(edit.before.things) == 2
        assert [(b.shape, b.color) for _, b in changed] == [tuple(edit.text.split()[2:])]


def test_plans_can_be_read_back() -> None:
    rng = np.random.default_rng(15)
    for _ in range(200):
        plan = language.sample_plan(rng)
        wanted = language.parse_thoughts(plan.thoughts)
        assert wanted is not None
        assert (wanted.background, sorted(wanted.things)) == shown(plan.scene)
    assert language.parse_thoughts("background white; red circle left") is None
    assert language.parse_thoughts("<think> background mauve; red circle left </think>") is None


def test_every_word_is_one_token(tmp_path) -> None:
    tokens.save(tokens.build(), tmp_path)
    text = TextCodec.from_dir(tmp_path)
    for line in language.vocabulary()[:300]:
        assert text.decode(text.encode(line)) == line
        words = line.replace("?", " ?").replace(".", " .").replace(";", " ;").replace("<", " < ").replace(">", " > ")
        assert len(text.encode(line)) <= len(words.split())
    assert len(text.encode(THINK_IMAGE)) < 60
    (tmp_path / "tokenizer.json").unlink()
    again = TextCodec.from_dir(tmp_path)
    assert again.turn(THINK_IMAGE) == text.turn(THINK_IMAGE)
    assert (again.bos, again.eos, again.image_start, again.image_end) == (
        text.bos, text.eos, text.image_start, text.image_end,
    )  # fmt: skip


def test_chances_are_those_of_one_answer_among_all() -> None:
    answers = {"color": 6, "shape": 3, "background": 4, "count": 2, "yesno": 2, "where": 4, "relation": 18}
    assert {kind: 1 / count for kind, count in answers.items()} == language.CHANCE
