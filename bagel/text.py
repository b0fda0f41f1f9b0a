"""Text to ids and back: the byte-level BPE tokenizer with BAGEL's wrapper tokens, and the think prompts. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from bagel.errors import BagelError

# Wrapper tokens, in the order in which missing ones are appended.
BOS, EOS, IMAGE_START, IMAGE_END = "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"

# The model's own system prompts for think mode; a space precedes the line break.
THINK_IMAGE = (
    "You should first think about the planning process in the mind and then generate the image. \n"
    "The planning process is enclosed within <think> </think> tags, "
    "i.e. <think> planning process here </think> image here"
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
        return cls(tokenizer, *ids)  # type: ignore[arg-type]

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
