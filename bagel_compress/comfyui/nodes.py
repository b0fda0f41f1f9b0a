"""The nodes: open a model, text to image, edit, several images, understanding, and two models from the same noise.

IMAGE is float [B, H, W, 3] in 0..1. Errors of a user are one sentence in ComfyUI's dialog; nothing answers with a black
picture.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bagel.settings import TextSettings
from bagel_compress.build.manifest import MANIFEST
from bagel_compress.comfyui.drawing import RATIOS, chosen, images, opened, pictures, run
from bagel_compress.comfyui.folders import device_targets, find_model, list_models
from bagel_compress.comfyui.model import BagelModel
from bagel_compress.comfyui.sockets import (
    CFG_IMAGE,
    CFG_TEXT,
    IMAGE,
    MODEL,
    SEED,
    STEPS,
    TEMPERATURE,
    THINKING,
    inputs,
    number,
    prompt,
    sampling,
)  # fmt: skip
from bagel_compress.comfyui.watch import Watch, giving_back
from bagel_compress.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

CATEGORY = "BAGEL"
NO_TARGET = "none"
GAIN = 4  # of the difference picture


class ModelLoader:
    """Opens a build of any format, or a full-precision checkpoint: a folder in models/bagel."""

    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES, RETURN_NAMES = ("BAGEL_MODEL",), ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        auto = {"default": False, "tooltip": "download the released model (29 GB) if it is chosen and not there"}
        target = {"default": NO_TARGET, "tooltip": "which part is on the GPU when; none: all of it"}
        return {
            "required": {"model_path": (list_models(), {}), "allow_auto_download": ("BOOLEAN", auto)},
            "optional": {"target": ([NO_TARGET, *device_targets()], target)},
        }  # fmt: skip

    def load(self, model_path: str, allow_auto_download: bool, target: str = NO_TARGET) -> tuple[BagelModel]:
        folder = find_model(model_path, allow_auto_download)
        return (BagelModel.enter(folder, None if target == NO_TARGET else target),)


class LegacyModelLoader(ModelLoader):
    """Opens a build of any format, or a full-precision checkpoint; with ComfyUI-BAGEL's choice of a quantisation."""

    MODES = ("BF16", "NF4", "INT8", "FP8")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        inputs = super().INPUT_TYPES()
        mode = {"default": "BF16", "tooltip": "a build is opened as it is stored; of a checkpoint only BF16"}
        inputs["required"]["quantization_mode"] = (list(cls.MODES), mode)
        return inputs

    def load(  # type: ignore[override]
        self, model_path: str, allow_auto_download: bool, quantization_mode: str, target: str = NO_TARGET
    ) -> tuple[BagelModel]:
        folder = find_model(model_path, allow_auto_download)
        if quantization_mode != "BF16" and not (folder / MANIFEST).is_file():
            raise InputError(
                f"quantization_mode is {quantization_mode}, but {model_path} is a full-precision checkpoint, and"
                " nothing is quantised while it loads; choose BF16, or make a build with `bagel-compress compress`."
            )
        return (BagelModel.enter(folder, None if target == NO_TARGET else target),)


class _Picture:
    """What nodes that draw have in common."""

    CATEGORY, FUNCTION = CATEGORY, "draw"
    RETURN_TYPES: tuple[str, ...] = ("IMAGE", "STRING")
    RETURN_NAMES: tuple[str, ...] = ("image", "thinking")

    @classmethod
    def IS_CHANGED(cls, seed: int, **others: Any) -> float:  # noqa: N802
        """ComfyUI draws again where this is another value; NaN equals nothing."""
        return float("nan") if seed == 0 else 0.0


class TextToImage(_Picture):
    """Draws a picture from a text."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        required = {
            "model": MODEL, "prompt": prompt("a red teapot on a wooden table"), "seed": SEED,
            "image_ratio": (list(RATIOS), {}), "cfg_text_scale": CFG_TEXT, "num_timesteps": STEPS,
        }  # fmt: skip
        return inputs(required, sampling(0.4, "global", 5.0))

    def draw(
        self, model: BagelModel, prompt: str, seed: int, image_ratio: str, node: str | None = None, **settings: Any
    ) -> tuple[Tensor, str]:
        result = run(model, [prompt], settings, seed, node, image_ratio)
        return pictures([result]), result.text or ""


class ImageEdit(_Picture):
    """Changes a picture by a text; of a batch, each picture, the k-th (from 0) with seed + k."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        required = {
            "model": MODEL, "image": IMAGE, "prompt": prompt("make it night"), "seed": SEED,
            "cfg_text_scale": CFG_TEXT, "cfg_img_scale": CFG_IMAGE, "num_timesteps": STEPS,
        }  # fmt: skip
        return inputs(required, sampling(0.0, "text_channel", 10.0))

    def draw(
        self, model: BagelModel, image: Tensor, prompt: str, seed: int, node: str | None = None, **settings: Any
    ) -> tuple[Tensor, str]:
        seed = chosen(seed)
        results = [run(model, [one, prompt], settings, seed + k, node) for k, one in enumerate(images(image))]
        return pictures(results), "\n".join(result.text or "" for result in results)


class MultiImageEdit(_Picture):
    """Makes one picture of several and a text; the last picture decides its size."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        required = {
            "model": MODEL, "ref_image_1": IMAGE, "ref_image_2": IMAGE,
            "prompt": prompt("put the first thing beside the second"), "seed": SEED,
            "cfg_text_scale": CFG_TEXT, "cfg_img_scale": CFG_IMAGE, "num_timesteps": STEPS,
        }  # fmt: skip
        more = {"ref_image_3": IMAGE, "ref_image_4": IMAGE}
        return inputs(required, more | sampling(0.0, "text_channel", 10.0))

    def draw(
        self, model: BagelModel, ref_image_1: Tensor, ref_image_2: Tensor, prompt: str, seed: int,
        ref_image_3: Tensor | None = None, ref_image_4: Tensor | None = None, node: str | None = None, **settings: Any,
    ) -> tuple[Tensor, str]:  # fmt: skip
        given = [ref_image_1, ref_image_2, ref_image_3, ref_image_4]
        turns = [one for batch in given if batch is not None for one in images(batch)]
        result = run(model, [*turns, prompt], settings, seed, node)
        return pictures([result]), result.text or ""


class ImageUnderstanding:
    """Answers a question about the pictures of a batch."""

    CATEGORY, FUNCTION = CATEGORY, "ask"
    RETURN_TYPES, RETURN_NAMES = ("STRING",), ("text",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        required = {"model": MODEL, "image": IMAGE, "prompt": prompt("What is in the picture?")}
        optional = {
            "show_thinking": THINKING, "do_sample": ("BOOLEAN", {"default": False}), "text_temperature": TEMPERATURE,
            "max_new_tokens": number("INT", 512, 64, 4096, 64, "at most this many"),
        }  # fmt: skip
        return inputs(required, optional)

    def ask(
        self, model: BagelModel, image: Tensor, prompt: str, show_thinking: bool = False, do_sample: bool = False,
        text_temperature: float = 0.3, max_new_tokens: int = 512, node: str | None = None,
    ) -> tuple[str]:  # fmt: skip
        sampler = opened(model)
        text = TextSettings(max_new_tokens, do_sample, text_temperature)
        with giving_back():
            result = sampler.run(
                [*images(image), prompt], output="text", think=show_thinking, text=text, listener=Watch(sampler, node)
            )
        return (result.text or "",)


class Compare(_Picture):
    """Draws one prompt with two models from the same noise; also their difference and PSNR."""

    RETURN_TYPES = ("IMAGE", "IMAGE", "IMAGE", "STRING")
    RETURN_NAMES = ("image_a", "image_b", f"difference_x{GAIN}", "psnr")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        inputs = TextToImage.INPUT_TYPES()
        rest = {name: spec for name, spec in inputs["required"].items() if name != "model"}
        return inputs | {"required": {"model_a": MODEL, "model_b": MODEL} | rest}

    def draw(
        self, model_a: BagelModel, model_b: BagelModel, prompt: str, seed: int, image_ratio: str,
        node: str | None = None, **settings: Any,
    ) -> tuple[Tensor, Tensor, Tensor, str]:  # fmt: skip
        from bagel_compress.parity.metrics import psnr

        seed = chosen(seed)
        drawn = [run(model, [prompt], settings, seed, node, image_ratio) for model in (model_a, model_b)]
        a, b = (pictures([result]) for result in drawn)
        if a.shape != b.shape:
            raise InputError(
                f"the models draw {a.shape[2]}x{a.shape[1]} and {b.shape[2]}x{b.shape[1]} pixels, expected one size;"
                " compare builds of one model."
            )
        value = psnr((a * 255).round()[0], (b * 255).round()[0])
        return a, b, ((a - b).abs() * GAIN).clamp(0, 1), f"PSNR {value:.1f} dB" if value < float("inf") else "equal"


NODES: dict[str, tuple[type, str]] = {
    "BagelCompressModelLoader": (ModelLoader, "BAGEL Model Loader (bagel-compress)"),
    "BagelCompressTextToImage": (TextToImage, "BAGEL Text to Image (bagel-compress)"),
    "BagelCompressImageEdit": (ImageEdit, "BAGEL Image Edit (bagel-compress)"),
    "BagelCompressMultiImageEdit": (MultiImageEdit, "BAGEL Multi-Image Edit (bagel-compress)"),
    "BagelCompressImageUnderstanding": (ImageUnderstanding, "BAGEL Image Understanding (bagel-compress)"),
    "BagelCompressCompare": (Compare, "BAGEL Compare Two Models (bagel-compress)"),
}
# ComfyUI-BAGEL's names.
LEGACY: dict[str, tuple[type, str]] = {
    "BagelModelLoader": (LegacyModelLoader, "BAGEL Model Loader"),
    "BagelTextToImage": (TextToImage, "BAGEL Text to Image"),
    "BagelImageEdit": (ImageEdit, "BAGEL Image Edit"),
    "BagelMultiImageEdit": (MultiImageEdit, "BAGEL Multi-Image Edit"),
    "BagelImageUnderstanding": (ImageUnderstanding, "BAGEL Image Understanding"),
}


def node_classes() -> dict[str, type]:
    """Name -> node. ComfyUI-BAGEL's names are left out where it has registered them; if it loads later, it takes them.

    Each name has a class of its own: ComfyUI writes into it.
    """
    comfyui = sys.modules.get("nodes")  # ComfyUI's own module, where this runs inside it
    taken = getattr(comfyui, "NODE_CLASS_MAPPINGS", {})
    free = {name: node for name, node in LEGACY.items() if name not in taken}
    return {name: type(name, (node,), {"DESCRIPTION": node.__doc__}) for name, (node, _) in (NODES | free).items()}


def display_names(nodes: Mapping[str, type]) -> dict[str, str]:
    """Name -> what the menu shows."""
    return {name: (NODES | LEGACY)[name][1] for name in nodes}
