"""CalibrationSet: what a model is shown while its rounding is decided, recorded once and used for many builds.

It holds inputs only (token ids, pictures, latents with their times), so it does not depend on the weights: a set that
was made with the base model serves its fine-tunes. One safetensors file with a typed header:

    picture/0 ..    uint8 [H, W, 3], resized as the ViT wants it
    latent/0 ..     bf16 [rows, cols, p*p*z]: packed VAE latents, clean or noised

A sequence is what one context reads in order (`trunk`), and what is computed on top of it and seen by nothing else
(`branches`): a noised picture at some time, or a text that was decoded. A guidance branch that dropped the text is a
branch after a shorter trunk; one that dropped the picture is a sequence of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError

from bagel_compress.errors import CalibrationError
from bagel_compress.io.atomic import atomic_path
from bagel_compress.io.yaml_model import FrozenModel

if TYPE_CHECKING:
    import torch

METADATA_KEY = "bagel_calibration"
PART_KEY = "bagel_calibration_part"
VERSION = 1  # of the header; raised by any change of what a field means
WRAPPERS = 2  # tokens around a picture


class TextPass(FrozenModel):
    """A text turn, wrapped: causal, each id takes a rope position."""

    kind: Literal["words"] = "words"
    ids: tuple[int, ...] = Field(min_length=1)


class ImagePass(FrozenModel):
    """A picture as ViT features between two wrapper tokens."""

    kind: Literal["seen"] = "seen"
    picture: int = Field(ge=0)


class CleanLatent(FrozenModel):
    """A picture as clean latent (t = 0) between two wrapper tokens."""

    kind: Literal["clean"] = "clean"
    latent: int = Field(ge=0)


class DecodedText(FrozenModel):
    """A text that was decoded after the first `after` events of the trunk, start token first."""

    kind: Literal["decoded"] = "decoded"
    after: int = Field(ge=0)
    ids: tuple[int, ...] = Field(min_length=1)


class NoisedLatent(FrozenModel):
    """A denoising pass at time `time` after the first `after` events of the trunk."""

    kind: Literal["noised"] = "noised"
    after: int = Field(ge=0)
    latent: int = Field(ge=0)
    time: float = Field(ge=0, le=1)


Event = Annotated[TextPass | ImagePass | CleanLatent, Field(discriminator="kind")]
Branch = Annotated[DecodedText | NoisedLatent, Field(discriminator="kind")]


class RecordedSequence(FrozenModel):
    """What one context reads, and what is computed on top of it."""

    name: str
    trunk: tuple[Event, ...] = ()
    branches: tuple[Branch, ...] = ()


class Inputs(FrozenModel):
    """The sizes of a model that its inputs depend on. The same for a base model and its fine-tunes."""

    vocabulary: int
    hidden: int
    latent_width: int = Field(description="values of one latent token")
    latent_places: int = Field(description="rows of the latent position table")
    vit_patch: int = Field(description="values of one ViT patch")
    vit_places: int = Field(description="rows of the ViT position table")

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> Inputs:
        """From the shapes of a checkpoint's tensors by official name."""
        return cls(
            vocabulary=shapes["language_model.model.embed_tokens.weight"][0],
            hidden=shapes["language_model.model.embed_tokens.weight"][1],
            latent_width=shapes["vae2llm.weight"][1],
            latent_places=shapes["latent_pos_embed.pos_embed"][0],
            vit_patch=shapes["vit_model.vision_model.embeddings.patch_embedding.weight"][1],
            vit_places=shapes["vit_pos_embed.pos_embed"][0],
        )


class Header(FrozenModel):
    """Where a set comes from and what is in it."""

    version: Literal[1] = 1
    inputs: Inputs
    tokenizer: str = Field(description="fingerprint of the tokenizer")
    source: str = Field(description="public name of the checkpoint that made it")
    source_digest: str
    latents: Literal["sampled", "pictures"] = Field(description="by the model's sampler, or of given pictures")
    versions: dict[str, str] = Field(default_factory=dict)
    sequences: tuple[RecordedSequence, ...] = ()


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that reach the linears of each expert; `read_*`: those whose result the last layer passes on."""

    und: int
    gen: int
    read_und: int
    read_gen: int


@dataclass(frozen=True)
class CalibrationSet:
    """A calibration set that was opened. `shapes`: of its tensors; the tensors are read one by one."""

    path: Path
    header: Header
    shapes: Mapping[str, tuple[int, ...]]
    key: str = ""  # of a part file: what it was made of

    @classmethod
    def open(cls, path: str | Path) -> CalibrationSet:
        """Raises CalibrationError on a missing, truncated or foreign file, and on events that point nowhere."""
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        try:
            with safe_open(str(path), framework="numpy") as handle:
                metadata = handle.metadata() or {}
                shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise CalibrationError(
                f"calibration set {path} does not exist; make one with `bagel-compress calibrate`."
            ) from None
        except (SafetensorError, OSError) as error:
            raise CalibrationError(
                f"calibration set {path} is truncated or no safetensors file ({error}); make or copy it again."
            ) from None
        found = cls(path, _header(path, metadata), shapes, metadata.get(PART_KEY, ""))
        found._check_references()
        return found

    @cached_property
    def digest(self) -> str:
        """sha256 of the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def rows(self) -> Rows:
        """How many rows each expert gets."""
        und = gen = read_und = read_gen = 0
        for sequence in self.header.sequences:
            for item in (*sequence.trunk, *sequence.branches):
                own_und, own_gen = self.rows_of(item)
                und, gen = und + own_und, gen + own_gen
                read_und += own_und if isinstance(item, DecodedText) else 0
                read_gen += own_gen if isinstance(item, NoisedLatent) else 0
        return Rows(und, gen, read_und, read_gen)

    def rows_of(self, item: TextPass | ImagePass | CleanLatent | DecodedText | NoisedLatent) -> tuple[int, int]:
        """Rows of the understanding and of the generation expert."""
        if isinstance(item, TextPass | DecodedText):
            return len(item.ids), 0
        if isinstance(item, ImagePass):
            height, width, channels = self.shapes[f"picture/{item.picture}"]
            return height * width * channels // self.header.inputs.vit_patch + WRAPPERS, 0
        rows, cols, _ = self.shapes[f"latent/{item.latent}"]
        return WRAPPERS, rows * cols

    def picture(self, index: int) -> torch.Tensor:
        """uint8 [H, W, 3]."""
        return self.tensor(f"picture/{index}")

    def latent(self, index: int) -> torch.Tensor:
        """bf16 [rows, cols, p*p*z]."""
        return self.tensor(f"latent/{index}")

    def expect_model(self, inputs: Inputs, tokenizer: str, what: str) -> None:
        """Raises CalibrationError unless the set fits a model with these inputs and this tokenizer."""
        for field in Inputs.model_fields:
            found, wanted = getattr(self.header.inputs, field), getattr(inputs, field)
            if found != wanted:
                raise CalibrationError(
                    f"calibration set {self.path} was made for {field} = {found}, {what} has {wanted};"
                    " make one with `bagel-compress calibrate --source` of this model."
                )
        if self.header.tokenizer != tokenizer:
            raise CalibrationError(
                f"calibration set {self.path} was made with another tokenizer ({self.header.tokenizer[:12]}) than that"
                f" of {what} ({tokenizer[:12]}), so its token ids mean other words; make one with"
                " `bagel-compress calibrate --source` of this model."
            )

    def tensor(self, name: str) -> torch.Tensor:
        """A stored tensor by its name."""
        from safetensors import safe_open

        with safe_open(str(self.path), framework="pt") as handle:
            return handle.get_tensor(name)  # type: ignore[no-any-return]

    def _check_references(self) -> None:
        """Raises CalibrationError if an event points at a tensor or a place in its trunk that is not there."""
        inputs = self.header.inputs
        for sequence in self.header.sequences:
            for item in (*sequence.trunk, *sequence.branches):
                fault = ""
                if (
                    isinstance(item, TextPass | DecodedText)
                    and not 0 <= min(item.ids) <= max(item.ids) < inputs.vocabulary
                ):
                    fault = f"a token id outside of 0 .. {inputs.vocabulary - 1}"
                if isinstance(item, ImagePass) and f"picture/{item.picture}" not in self.shapes:
                    fault = f"picture {item.picture}, which is not there"
                if isinstance(item, CleanLatent | NoisedLatent):
                    shape = self.shapes.get(f"latent/{item.latent}", ())
                    if len(shape) != 3 or shape[2] != inputs.latent_width:
                        fault = f"latent {item.latent}, which is not there or not {inputs.latent_width} wide"
                if isinstance(item, DecodedText | NoisedLatent) and item.after > len(sequence.trunk):
                    fault = f"a branch after {item.after} of {len(sequence.trunk)} events"
                if fault:
                    raise CalibrationError(
                        f"calibration set {self.path}: sequence {sequence.name} holds {fault}; make the set again."
                    )


def save(path: Path, header: Header, tensors: Mapping[str, torch.Tensor], key: str = "") -> None:
    """Writes a set, or with `key` a part of one; a temporary name is used until it is complete."""
    from safetensors.torch import save_file

    ordered = {name: tensors[name].contiguous() for name in sorted(tensors)}
    metadata = {METADATA_KEY: header.model_dump_json()} | ({PART_KEY: key} if key else {})
    with atomic_path(path) as partial:
        save_file(ordered, str(partial), metadata=metadata)


def join(sets: Iterable[CalibrationSet]) -> tuple[tuple[RecordedSequence, ...], dict[str, torch.Tensor]]:
    """Sequences and tensors of several sets as one; a picture that several hold is kept once."""
    sequences: list[RecordedSequence] = []
    tensors: dict[str, torch.Tensor] = {}
    known: dict[bytes, int] = {}
    latents = 0
    for part in sets:
        pictures: list[int] = []
        for index in range(sum(name.startswith("picture/") for name in part.shapes)):
            picture = part.picture(index)
            key = bytes(str(tuple(picture.shape)), "ascii") + picture.numpy().tobytes()
            pictures.append(known.setdefault(key, len(known)))
            tensors[f"picture/{pictures[-1]}"] = picture
        own = sum(name.startswith("latent/") for name in part.shapes)
        tensors |= {f"latent/{latents + i}": part.latent(i) for i in range(own)}
        sequences += [_renumbered(s, pictures, latents) for s in part.header.sequences]
        latents += own
    return tuple(sequences), tensors


def tokenizer_fingerprint(files: Mapping[str, Path]) -> str:
    """sha256 over vocabulary, wrapper ids and a probe text; the same for every packaging of one tokenizer.

    `files`: of a checkpoint by name, wherever each lies.
    """
    import shutil
    from tempfile import TemporaryDirectory

    from bagel.text import TextCodec

    names = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
    with TemporaryDirectory() as folder:
        for name in names:
            if name in files:
                shutil.copyfile(files[name], Path(folder) / name)
        return codec_fingerprint(TextCodec.from_dir(Path(folder)))


def codec_fingerprint(text: Any) -> str:
    """The fingerprint of a `bagel.text.TextCodec`."""
    probe = "The quick brown fox jumps over 13 lazy dogs; naïve café, 東京.\n\tred circle left"
    total = hashlib.sha256(json.dumps(sorted(text.tokenizer.get_vocab(with_added_tokens=True).items())).encode())
    total.update(json.dumps([text.bos, text.eos, text.image_start, text.image_end, text.encode(probe)]).encode())
    return total.hexdigest()


def _renumbered(sequence: RecordedSequence, pictures: Sequence[int], latents: int) -> RecordedSequence:
    def moved(item: Any) -> Any:
        if isinstance(item, ImagePass):
            return item.model_copy(update={"picture": pictures[item.picture]})
        if isinstance(item, CleanLatent | NoisedLatent):
            return item.model_copy(update={"latent": item.latent + latents})
        return item

    trunk, branches = tuple(map(moved, sequence.trunk)), tuple(map(moved, sequence.branches))
    return sequence.model_copy(update={"trunk": trunk, "branches": branches})


def _header(path: Path, metadata: Mapping[str, str]) -> Header:
    if METADATA_KEY not in metadata:
        raise CalibrationError(
            f"{path} is no calibration set: its header has no {METADATA_KEY}; make one with `bagel-compress calibrate`."
        )
    try:
        raw = json.loads(metadata[METADATA_KEY])
        if isinstance(raw, dict) and raw.get("version") != VERSION:
            raise CalibrationError(
                f"calibration set {path} has version {raw.get('version')}, this tool reads {VERSION}; make it again."
            )
        return Header.model_validate(raw)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise CalibrationError(
            f"calibration set {path} has a damaged header ({where}: {fault['msg']}); make it again."
        ) from None
    except (ValueError, RecursionError) as error:  # no JSON, integers of 5,000 digits, deep nesting
        raise CalibrationError(f"calibration set {path} has a damaged header ({error}); make it again.") from None
