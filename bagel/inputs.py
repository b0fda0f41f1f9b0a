"""From strings and pictures to ids and tensors: tokenizer, resize rules, patches' and latents' position ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from bagel.config import ResizeRule
from bagel.errors import BagelError

# Wrapper tokens, in the order in which missing ones are appended.
BOS, EOS, IMAGE_START, IMAGE_END = "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"

# The model's own system prompts for think mode; a space precedes the line break.
THINK_IMAGE = (
    "You should first think about the planning process in the mind and then generate the image. \n"
    "The planning process is enclosed within <think> </think> tags, i.e. <think> planning process here </think> image here"
)
THINK_TEXT = (
    "You should first think about the reasoning process in the mind and then provide the user with the answer. \n"
    "The reasoning process is enclosed within <think> </think> tags, "
    "i.e. <think> reasoning process here </think> answer here"
)

# Split pattern of Qwen2's byte-level BPE; used only where a folder has no tokenizer.json.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class TextCodec:
    """Byte-level BPE with the four wrapper tokens. Text turns are `bos, ids, eos`; there is no chat template."""

    tokenizer: Tokenizer
    bos: int
    eos: int
    image_start: int
    image_end: int

    @classmethod
    def from_dir(cls, folder: Path) -> TextCodec:
        """Reads tokenizer.json, or vocab.json and merges.txt. Appends wrapper tokens that are missing, in order."""
        config_file = folder / "tokenizer_config.json"
        config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.exists() else {}
        if (folder / "tokenizer.json").exists():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            tokenizer = _from_vocab(folder, config)
        else:
            raise BagelError(
                f"{folder} has no tokenizer: neither tokenizer.json nor vocab.json with merges.txt;"
                " copy them from the base model's folder."
            )
        for token in (BOS, EOS, IMAGE_START, IMAGE_END):
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        ids = [tokenizer.token_to_id(token) for token in (BOS, EOS, IMAGE_START, IMAGE_END)]
        return cls(tokenizer, *ids)

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone. Special-token strings inside it are matched as special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids  # type: ignore[no-any-return]

    def turn(self, text: str) -> list[int]:
        """Ids of one text turn, wrapped. An empty text is two tokens."""
        return [self.bos, *self.encode(text), self.eos]

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text, special tokens kept, undecodable bytes as U+FFFD."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)  # type: ignore[no-any-return]

    def answer(self, ids: Sequence[int]) -> str:
        """The text of a decoding run: what follows the first bos, up to the first eos or a second bos."""
        text = self.decode(ids).split(EOS)[0]
        parts = text.split(BOS)
        return parts[1] if len(parts) > 1 else text


def _from_vocab(folder: Path, config: dict) -> Tokenizer:  # type: ignore[type-arg]
    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    added = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    tokenizer.add_special_tokens([AddedToken(entry["content"], special=True, normalized=False) for _, entry in added])
    return tokenizer


# --- pictures ---------------------------------------------------------------------------------------------------------


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB; transparency is composited on white, other modes are plainly converted."""
    if image.mode == "RGBA" or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def resized_sides(width: int, height: int, rule: ResizeRule, image_count: int = 1) -> tuple[int, int]:
    """(width, height) after the rule. Both roundings are half-to-even, and the pixel cap scales sides by the area ratio.

    The short-side minimum wins over the long-side maximum first; the last step then enforces the maximum.
    """
    scale = min(rule.max_size / max(width, height), 1.0)
    scale = max(scale, rule.min_size / min(width, height))
    w, h = _scaled(width, height, scale, rule.stride)
    cap = rule.max_pixels / image_count
    if w * h > cap:
        w, h = _scaled(w, h, cap / (w * h), rule.stride)
    if max(w, h) > rule.max_size:
        w, h = _scaled(w, h, rule.max_size / max(w, h), rule.stride)
    return w, h


def _scaled(width: int, height: int, scale: float, stride: int) -> tuple[int, int]:
    w, h = (max(stride, round(round(side * scale) / stride) * stride) for side in (width, height))
    return w, h


def resized(image: Image.Image, rule: ResizeRule) -> Image.Image:
    """Pillow's bicubic resize by the rule; an image that already fits is returned unchanged."""
    sides = resized_sides(image.width, image.height, rule)
    return image if sides == image.size else image.resize(sides, Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> [3, H, W] fp32 in [-1, 1]."""
    pixels_HWC = torch.from_numpy(np.array(image, dtype=np.uint8))
    return (pixels_HWC.permute(2, 0, 1).float() / 255 - 0.5) / 0.5


def grid_ids(rows: int, cols: int, max_per_side: int, interpolate: bool = False) -> Tensor:
    """Position ids of a rows x cols grid in a max_per_side² table, row-major.

    Plain: row * max + col from the table's top-left corner. Interpolated: each coordinate i/n falls into one of `max`
    equal buckets, closed on the right.
    """
    if interpolate:
        bounds = torch.arange(1 / max_per_side, 1.0, 1 / max_per_side)
        row = torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / rows), bounds, right=True)
        col = torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / cols), bounds, right=True)
    else:
        row, col = torch.arange(rows), torch.arange(cols)
    return (row[:, None] * max_per_side + col[None, :]).flatten()
