"""CLIP scores by a small random model: against transformers' own preprocessing, a folder's faults, a report."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from bagel.errors import BagelError
from bagel_compress.build.limits import resolve
from bagel_compress.errors import RecipeError, TraceError
from bagel_compress.parity.clip import Clip
from bagel_compress.parity.compare import Candidate, compare
from bagel_compress.parity.network_metrics import Networks

transformers = pytest.importorskip("transformers")
SIDE, LONGEST = 32, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP of random weights in the layout of the Hub, whose tokenizer knows letters."""
    path = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(97, 123)]
    tokens = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer.from_pretrained(path).save_pretrained(path)
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = shared | {
        "vocab_size": len(tokens), "max_position_embeddings": LONGEST, "bos_token_id": 52, "eos_token_id": 53,
    }  # fmt: skip
    vision = shared | {"image_size": SIDE, "patch_size": 8}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(path)
    return path


def picture(height, width):
    rng = np.random.default_rng(3)
    coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return torch.from_numpy(np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize("size", [(32, 32), (48, 96), (100, 40)])
@pytest.mark.parametrize("text", ["a red cat", "words that go on for longer than the model can read"])
def test_it_is_what_transformers_computes(folder, size, text):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image = picture(*size)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    pixels = processor(images=[Image.fromarray(image.numpy())], return_tensors="pt")["pixel_values"]
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    ids = tokenizer([text], return_tensors="pt", truncation=True, max_length=LONGEST)["input_ids"]
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        found = model(input_ids=ids, pixel_values=pixels)
    expected = (found.image_embeds @ found.text_embeds.T).item()
    assert Clip.open(folder)(image, text) == pytest.approx(expected, abs=1e-5)


def test_other_words_and_other_pictures_score_differently(folder):
    clip, image = Clip.open(folder), picture(48, 48)
    assert clip(image, "a red cat") != pytest.approx(clip(image, "zebra"), abs=1e-4)
    assert clip(image, "a red cat") != pytest.approx(clip(255 - image, "a red cat"), abs=1e-4)


@pytest.mark.parametrize("missing", ["tokenizer.json", "model.safetensors", "config.json"])
def test_an_incomplete_folder(folder, tmp_path, missing):
    for file in folder.iterdir():
        if file.name != missing:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(TraceError, match="holds no CLIP model"):
        Clip.open(tmp_path)


def test_a_damaged_tokenizer_is_one_sentence(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for content in ("{}", '{"model": {"type": "BPE", "continuing_subword_prefix": "#"}}', "{,"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(BagelError, match=r"tokenizer\.json"):
            Clip.open(tmp_path)


def test_its_place_in_a_report(reference, trace_file, folder):
    """A lossless build loses nothing of the score; a limit on it closes, and is refused without a model."""

    def judged(limit, networks):
        limits = resolve("lossless", {"image.clip_drop": limit})
        return compare(Candidate(reference, "x", "0", "lossless", limits), [trace_file], networks=networks).report

    with pytest.raises(RecipeError, match="give them with --clip DIR"):
        judged(0.1, Networks())
    networks = Networks(clip=Clip.open(folder))
    report = judged(0.0, networks)
    assert report.passed
    assert {c.metrics["image.clip_drop"] for c in report.cases if c.has_image} == {0.0}
    assert all(-1 <= c.metrics["image.clip"] <= 1 for c in report.cases if c.has_image)
    [sentence] = judged(-1.0, networks).broken
    assert "image.clip_drop is 0, above the limit of -1" in sentence
