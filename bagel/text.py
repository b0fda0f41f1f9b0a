"""Text to ids and back: the byte-level BPE tokenizer with BAGEL's wrapper tokens, and the think prompts. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from bagel.errors import BagelError
from bagel.json_file import read_object

# Wrapper tokens, in the order in which missing ones are appended.
WRAPPERS = BOS, EOS, IMAGE_START, IMAGE_END = "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"
FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")  # what a tokenizer is read from

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
        """Reads tokenizer.json, or vocab.json and merges.txt. Appends wrapper tokens that are missing, in order.

        Raises BagelError if there is neither, or if the files do not agree on the ids of the wrapper tokens.
        """
        return cls.from_files({name: folder / name for name in FILES if (folder / name).exists()}, folder)

    @classmethod
    def from_files(cls, files: Mapping[str, Path], folder: Path) -> TextCodec:
        """`from_dir` of files that may lie in several folders; `folder` names them in errors."""
        added = _added(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
        if "tokenizer.json" in files:
            tokenizer = opened_tokenizer(files["tokenizer.json"])
        elif {"vocab.json", "merges.txt"} <= files.keys():
            tokenizer = _from_vocab(files["vocab.json"], files["merges.txt"], added)
        else:
            raise BagelError(
                f"{folder} has no tokenizer: neither tokenizer.json nor vocab.json with merges.txt;"
                " copy them from the base model's folder."
            )
        for token in WRAPPERS:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        ids = [tokenizer.token_to_id(token) for token in WRAPPERS]
        if "vocab.json" in files and (slow := _slow_ids(files["vocab.json"], added)) != ids:
            raise BagelError(
                f"{folder}: its tokenizer files disagree on the ids of {', '.join(WRAPPERS)}: {ids} by their order in "
                f"{'tokenizer.json' if 'tokenizer.json' in files else 'vocab.json'}, {slow} by vocab.json and "
                "tokenizer_config.json, so readers of it would get different pictures; copy all from the base model."
            )
        return cls(tokenizer, *ids)  # type: ignore[arg-type]

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone. Special-token strings inside it are matched as special tokens."""
        with library_errors("the tokenizer cannot encode a text"):
            return self.tokenizer.encode(text, add_special_tokens=False).ids  # type: ignore[no-any-return]

    def turn(self, text: str) -> list[int]:
        """Ids of one text turn, wrapped. An empty text is two tokens."""
        return [self.bos, *self.encode(text), self.eos]

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text, special tokens kept, undecodable bytes as U+FFFD."""
        with library_errors("the tokenizer cannot decode ids"):
            return self.tokenizer.decode(list(ids), skip_special_tokens=False)  # type: ignore[no-any-return]

    def answer(self, ids: Sequence[int]) -> str:
        """The text of a decoding run: what follows the first bos, up to the first eos or a second bos."""
        text = self.decode(ids).split(EOS)[0]
        parts = text.split(BOS)
        return parts[1] if len(parts) > 1 else text


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """BagelError in place of what the library raises: no class of its own, and panics, which are no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise BagelError(f"{what} ({error}); copy the tokenizer's files again.") from None


def opened_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json. Raises BagelError for any other file."""
    model = read_object(path).get("model")  # the library's own error for a damaged file names no file
    if isinstance(model, dict) and model.get("continuing_subword_prefix"):  # the library would panic, on stderr as well
        raise BagelError(
            f"{path}: continuing_subword_prefix is set, expected none in a byte-level BPE; copy the file again."
        )
    with library_errors(f"{path} is no tokenizer"):
        return Tokenizer.from_file(str(path))


def _from_vocab(vocab: Path, merges: Path, added: Mapping[str, int]) -> Tokenizer:
    read_object(vocab)
    with library_errors(f"{vocab} and {merges.name} are no tokenizer"):
        tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    words = sorted(added, key=lambda word: added[word])
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in words])
    return tokenizer


def _added(config: Path) -> dict[str, int]:
    """Added tokens of tokenizer_config.json with their ids."""
    table = read_object(config).get("added_tokens_decoder", {})
    fault = BagelError(f"{config}: added_tokens_decoder is no table of ids and tokens; copy it from the base model.")
    if not isinstance(table, dict):
        raise fault
    found: dict[str, int] = {}
    for number, entry in table.items():
        word = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(word, str) or not (number.isascii() and number.isdecimal() and len(number) < 10):
            raise fault
        found[word] = int(number)
    return found


def _slow_ids(vocab: Path, added: Mapping[str, int]) -> list[int]:
    """Ids of the wrapper tokens in `Qwen2Tokenizer`, which the official code uses.

    It takes ids from tokenizer_config.json, else from vocab.json; others are appended after all that are there.
    """
    ids: dict[str, Any] = dict(added)
    if not set(WRAPPERS) <= ids.keys():
        ids = read_object(vocab) | ids
    for token in WRAPPERS:
        ids.setdefault(token, len(ids))
    return [ids[token] for token in WRAPPERS]
