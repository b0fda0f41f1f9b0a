"""Case: one request for validation, recorded in a trace; a YAML file under exports/cases/.

A case fixes everything that influences a picture or a text except the weights: the turns, the size, every sampler
setting, the seed. Input pictures are files in the folder of the case.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from bagel.settings import SEEDS, FlowSettings
from bagel_compress.build.speed_settings import SpeedSettings, checked
from bagel_compress.errors import TargetError
from bagel_compress.io.yaml_model import FrozenModel, load_yaml, meaning_digest

Kind = Literal["t2i", "edit", "understand", "chat"]
Renorm = Literal["global", "channel", "text_channel"]


class Picture(FrozenModel):
    """An input picture."""

    image: str = Field(description="file beside the case")


class Flow(SpeedSettings):
    """Settings of the image sampler; the meaning and the defaults are bagel.flow.FlowSettings'."""

    num_timesteps: int = Field(default=50, ge=2)
    timestep_shift: float = Field(default=3.0, gt=0)
    cfg_text_scale: float = 4.0
    cfg_img_scale: float = 1.0
    cfg_interval: tuple[float, float] = (0.4, 1.0)
    cfg_renorm_min: float = 0.0
    cfg_renorm_type: Renorm = "global"

    @model_validator(mode="after")
    def _possible(self) -> Self:
        checked(FlowSettings, **self.model_dump())
        return self


class TextDecoding(FrozenModel):
    """Settings of text decoding; bagel.sampler.TextSettings. Sampling is left out: a trace compares greedy text."""

    max_tokens: int = Field(default=256, ge=1)


class Record(FrozenModel):
    """How much is recorded: number of denoising steps (evenly spaced, with the first and last) and of logits."""

    steps: int = Field(default=12, ge=1)
    logits: int = Field(default=64, ge=1)
    tap_rows: int = Field(default=16, ge=1, description="rows of each layer's state, evenly spaced")


class Case(FrozenModel):
    """One request."""

    name: str = Field(pattern=r"^[\w-]+$")
    kind: Kind
    turns: tuple[Annotated[str | Picture, Field(union_mode="left_to_right")], ...] = Field(min_length=1)
    think: bool = False
    size: tuple[int, int] | None = Field(None, description="height, width; an edit takes the last picture's")
    seed: int = Field(default=0, ge=0, lt=SEEDS)
    flow: Flow = Flow()
    text: TextDecoding = TextDecoding()
    record: Record = Record()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        pictures = len(self.pictures)
        if self.kind in ("edit", "understand") and pictures == 0:
            raise ValueError(f"kind {self.kind} needs a picture among its turns")
        if self.kind in ("t2i", "chat") and pictures:
            raise ValueError(f"kind {self.kind} takes no picture; use edit or understand")
        if self.kind == "t2i" and self.size is None:
            raise ValueError("kind t2i needs a size (height, width)")
        if self.kind != "t2i" and self.size is not None:
            raise ValueError(f"kind {self.kind} takes no size; only t2i does")
        return self

    @property
    def makes_image(self) -> bool:
        return self.kind in ("t2i", "edit")

    @property
    def pictures(self) -> tuple[str, ...]:
        """Files of the input pictures, in order."""
        return tuple(turn.image for turn in self.turns if isinstance(turn, Picture))

    @property
    def digest(self) -> str:
        """sha256 of the case's values."""
        return meaning_digest(self)

    @classmethod
    def load(cls, path: str | Path) -> Case:
        """Reads a YAML file. Raises TargetError naming file and key if it is not valid."""
        return load_yaml(cls, Path(path), "case", TargetError)


def load_cases(paths: list[str | Path]) -> list[tuple[Case, Path]]:
    """The cases of files and of folders (all *.yaml, by name), each with the folder of its pictures.

    Raises TargetError on a folder without cases and on two cases of one name.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        found = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
        if not found:
            raise TargetError(f"{path} holds no case (*.yaml); give a case file or a folder of them.")
        files += found
    cases = [(Case.load(file), file.parent) for file in files]
    names = [case.name for case, _ in cases]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise TargetError(f"two cases are called {twice[0]!r}; names of cases must differ.")
    return cases
