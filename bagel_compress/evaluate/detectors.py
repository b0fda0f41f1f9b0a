"""Detector and colour classifier for GenEval from folders that the user has, by transformers; nothing is downloaded.

The detector is a Mask2Former for instances (then colours are judged on the thing alone, as officially) or any object
detection model. Its class names must be those of the prompts (COCO's, for GenEval).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bagel_compress.errors import BenchmarkError, MissingExtraError
from bagel_compress.evaluate.geneval import COLORS, THRESHOLD, Colors, Detection, Detector
from bagel_compress.parity.clip import Clip

COCO_TO_GENEVAL = {  # where the names differ
    "mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard", "tvmonitor": "tv",
    "sofa": "couch", "pottedplant": "potted plant", "diningtable": "dining table", "motorbike": "motorcycle",
    "aeroplane": "airplane",
}  # fmt: skip
BACKDROP = (0x99, 0x99, 0x99)  # behind a thing that is cut out


def open_detector(folder: str | Path, device: str = "cpu") -> Detector:
    """Raises MissingExtraError without transformers, BenchmarkError on a folder that holds no detector."""
    try:
        from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection
        from transformers import Mask2FormerForUniversalSegmentation as Mask2Former
    except ImportError:
        raise MissingExtraError(
            "GenEval's detector needs the package transformers; install it with:"
            " pip install 'bagel-compress[evaluate]'."
        ) from None
    local: dict[str, Any] = {"local_files_only": True}
    try:
        masks = AutoConfig.from_pretrained(str(folder), **local).model_type == "mask2former"
        processor: Any = AutoImageProcessor.from_pretrained(str(folder), **local)
        kind: Any = Mask2Former if masks else AutoModelForObjectDetection
        model: Any = kind.from_pretrained(str(folder), use_safetensors=True, **local).eval().to(device)
    except (OSError, ValueError, KeyError) as error:
        raise BenchmarkError(
            f"{folder} holds no detector ({str(error).splitlines()[0]}); give a folder in the layout of the Hub with"
            " config.json, preprocessor_config.json and model.safetensors."
        ) from None
    names = model.config.id2label

    @torch.no_grad()
    def detect(image: Image.Image) -> Sequence[Detection]:
        found = model(**processor(images=image, return_tensors="pt").to(device))
        size = [(image.height, image.width)]
        if masks:
            result = processor.post_process_instance_segmentation(found, THRESHOLD, target_sizes=size)[0]
            return _masked(result, names)
        result = processor.post_process_object_detection(found, THRESHOLD, target_sizes=size)[0]
        rows = zip(result["labels"].tolist(), result["boxes"].tolist(), result["scores"].tolist(), strict=True)
        return [Detection(_name(names, label), tuple(box), score) for label, box, score in rows]

    return detect


def _masked(result: Any, names: Any) -> list[Detection]:
    things = []
    for segment in result["segments_info"]:
        mask = (result["segmentation"] == segment["id"]).cpu().numpy()
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if len(rows):
            box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
            things.append(Detection(_name(names, segment["label_id"]), box, float(segment["score"]), mask))
    return things


def _name(names: Any, label: int) -> str:
    name = str(names[label])
    return COCO_TO_GENEVAL.get(name, name)


def open_colors(folder: str | Path) -> Colors:
    """Zero-shot colours by a CLIP model, with the official prompts. Raises as `Clip.open` does."""
    clip = Clip.open(folder)

    def colors(image: Image.Image, things: Sequence[Detection]) -> list[str]:
        return [_color(clip, _cut_out(image, thing), thing.name) for thing in things]

    return colors


def _color(clip: Clip, image: Image.Image, name: str) -> str:
    prompts = [
        [f"a photo of a {color} {name}", f"a photo of a {color}-colored {name}", f"a photo of a {color} object"]
        for color in COLORS
    ]
    return COLORS[clip.classify(torch.from_numpy(np.array(image)), prompts)]


def _cut_out(image: Image.Image, thing: Detection) -> Image.Image:
    """The thing alone where there is a mask, else its box."""
    if thing.mask is not None:
        image = Image.composite(image, Image.new("RGB", image.size, BACKDROP), Image.fromarray(thing.mask))
    x0, y0, x1, y1 = thing.box
    return image.crop((int(x0), int(y0), max(int(x0) + 1, round(x1)), max(int(y0) + 1, round(y1))))
