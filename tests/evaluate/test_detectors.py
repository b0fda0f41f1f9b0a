"""GenEval through real model classes of transformers with random weights: detections, colours, and the whole path."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import miniature
import numpy as np
import pytest
import torch
from PIL import Image

from bagel.nano.scenes import SIDE
from bagel_compress.errors import BenchmarkError
from bagel_compress.evaluate.detectors import open_colors, open_detector
from bagel_compress.evaluate.geneval import COLORS, Detection

transformers = pytest.importorskip("transformers")
NANO = Path(__file__).parents[2] / "bagel_compress" / "data" / "BAGEL-nano"
NAMES = {0: "circle", 1: "mouse"}  # the second is called computer mouse in GenEval


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mask2Former that is sure of circles: the bias of its classifier says so."""
    folder = tmp_path_factory.mktemp("mask2former")
    backbone = transformers.SwinConfig(
        image_size=SIDE, patch_size=2, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=6, id2label=NAMES,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.bias.copy_(torch.tensor([9.0, 0.0, 0.0]))
    model.save_pretrained(folder)
    _processor(folder, "Mask2FormerImageProcessor", "Mask2FormerImageProcessorPil", num_labels=2)
    return folder


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YOLOS that sees a mouse in every one of its three places."""
    folder = tmp_path_factory.mktemp("yolos")
    config = transformers.YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[SIDE, SIDE],
        patch_size=8, num_detection_tokens=3, id2label=NAMES,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.YolosForObjectDetection(config)
    with torch.no_grad():
        model.class_labels_classifier.layers[-1].bias.copy_(torch.tensor([0.0, 9.0, 0.0]))
    model.save_pretrained(folder)
    _processor(folder, "YolosImageProcessor", "YolosImageProcessorPil")
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP whose tokenizer knows letters alone."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [*"abcdefghijklmnopqrstuvwxyz-"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    start = len(tokens) - 2
    shared = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(tokens), "max_position_embeddings": 77, "bos_token_id": start, "eos_token_id": start + 1}
    vision = shared | {"image_size": SIDE, "patch_size": 8}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=shared | text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


def _processor(folder: Path, *names: str, **more: object) -> None:
    """preprocessor_config.json for pictures of SIDE pixels, of whichever class this version of transformers has."""
    made = next(getattr(transformers, name) for name in names if hasattr(transformers, name))
    made(size={"height": SIDE, "width": SIDE}, **more).save_pretrained(folder)
    config = folder / "preprocessor_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"image_processor_type": names[0]}))


def test_masks_become_things_in_the_size_of_the_picture(masks: Path) -> None:
    image = miniature.picture(0).resize((48, 40))
    found = open_detector(masks)(image)
    assert found
    for thing in found:
        x0, y0, x1, y1 = thing.box
        assert thing.name == "circle"
        assert thing.confidence > 0.3
        assert thing.mask is not None
        assert thing.mask.shape == (40, 48)
        assert thing.mask[int(y0) : int(y1), int(x0) : int(x1)].sum() == thing.mask.sum() > 0


def test_boxes_become_things_under_genevals_names(boxes: Path) -> None:
    found = open_detector(boxes)(miniature.picture(0).resize((64, 32)))
    assert [thing.name for thing in found] == ["computer mouse"] * 3
    assert all(thing.mask is None and thing.confidence > 0.9 for thing in found)
    assert max(thing.box[2] for thing in found) > 1  # pixels, no shares


def test_colours_are_asked_of_the_thing_alone(clip: Path) -> None:
    colors = open_colors(clip)
    picture = np.zeros((SIDE, SIDE, 3), np.uint8)
    picture[8:24, 8:24] = (200, 30, 30)
    other = picture.copy()
    other[:8] = (0, 0, 255)  # outside of the mask and the box
    mask = picture[..., 0] > 0
    thing = Detection("circle", (8, 8, 24, 24), 0.9, mask)
    first, second = (colors(Image.fromarray(p), [thing]) for p in (picture, other))
    assert first == second
    assert set(first) <= set(COLORS)


def test_geneval_is_scored_in_one_command(
    cli: Callable[..., tuple[int, str, str]], tmp_path: Path, masks: Path, clip: Path
) -> None:
    rows = [
        {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a red circle"},
        {"tag": "single_object", "include": [{"class": "square", "count": 1}], "prompt": "a blue square"},
        {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}], "prompt": "a red circle"},
    ]
    miniature.put(tmp_path / "data" / "evaluation_metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    asked = ("evaluate", "geneval", NANO, "--data", tmp_path / "data", "--out", tmp_path / "out", "--dtype", "fp32",
             "--steps", 2, "--side", SIDE, "--pictures", 1, "--detector", masks, "--clip", clip, "--json")  # fmt: skip
    code, text, err = cli(*asked)
    assert code == 0, err
    scores = {score["name"]: score["value"] for score in json.loads(text)["scores"]}
    assert scores["single_object"] == 50  # it sees circles and no square, whatever was drawn
    assert scores["overall"] == pytest.approx((50 + scores["colors"]) / 2)
    assert json.loads(cli(*asked)[1])["scores"] == json.loads(text)["scores"]


def test_a_folder_without_a_detector_is_refused(tmp_path: Path, clip: Path) -> None:
    for folder in (tmp_path, clip):
        with pytest.raises(BenchmarkError, match="holds no detector"):
            open_detector(folder)
