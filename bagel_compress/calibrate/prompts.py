"""Prompts of a calibration set, as YAML under exports/calibration/: what the model is asked while a set is made.

One file holds prompts of one kind. A drawing is made from its prompt; an edit changes, and a question asks about, a
drawing of another file by its name, so that no picture has to be carried along. `answer` is what is decoded where the
model itself does not run (a set of given pictures); a plan's answer is its think text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from bagel.settings import FlowSettings
from bagel_compress.errors import CalibrationError
from bagel_compress.io.yaml_model import FrozenModel, load_yaml

Kind = Literal["drawing", "edit", "question", "plan"]
ORDER: tuple[Kind, ...] = ("drawing", "plan", "edit", "question")  # what others refer to comes first


class Asked(FrozenModel):
    """One prompt."""

    prompt: str
    name: str = Field("", pattern=r"^[\w-]*$", description="by which edits and questions refer to a drawing")
    picture: str = Field("", description="name of a drawing: the input picture")
    answer: str = Field("", description="a right answer, or the think text of a plan, for sets of given pictures")
    size: tuple[int, int] | None = Field(None, description="height, width; default: the file's")


class Prompts(FrozenModel):
    """The prompts of one kind, and how they are run."""

    kind: Kind
    prompts: tuple[Asked, ...] = Field(min_length=1)
    size: tuple[int, int] = Field((512, 512), description="height, width of a drawing")
    times: int = Field(2, ge=1, description="denoising steps that are kept of each picture")
    max_tokens: int = Field(256, ge=1, description="longest decoded text, start token included")
    flow: FlowSettings = FlowSettings()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for asked in self.prompts:
            if self.kind == "edit" and not asked.picture:
                raise ValueError(f"edit {asked.prompt!r} names no picture")
            if self.kind == "drawing" and asked.picture:
                raise ValueError(f"drawing {asked.prompt!r} names a picture; use kind edit")
        return self

    @classmethod
    def load(cls, path: str | Path) -> Prompts:
        """Reads a YAML file. Raises CalibrationError: file, key, found, expected."""
        return load_yaml(cls, Path(path), "file of calibration prompts", CalibrationError)


class Job(FrozenModel):
    """One prompt with what it is run with. `name` is unique; `picture` names the job whose drawing is the input."""

    name: str
    kind: Kind
    asked: Asked
    size: tuple[int, int]
    times: int
    max_tokens: int
    flow: FlowSettings


def load_jobs(paths: Sequence[str | Path]) -> list[Job]:
    """The jobs of files and folders (their *.yaml), in an order in which each drawing comes before its use.

    Raises CalibrationError on a folder without prompts, a name that two drawings have, and an unknown drawing.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        found = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
        if not found:
            raise CalibrationError(f"{path} holds no calibration prompts (*.yaml); give a file or a folder of them.")
        files += found
    groups = sorted((Prompts.load(file) for file in files), key=lambda group: ORDER.index(group.kind))
    jobs: list[Job] = []
    for group in groups:
        for asked in group.prompts:
            name = asked.name or f"{group.kind}_{sum(job.kind == group.kind for job in jobs) + 1:03d}"
            size = asked.size or group.size
            jobs.append(
                Job(name=name, kind=group.kind, asked=asked, size=size, times=group.times,
                    max_tokens=group.max_tokens, flow=group.flow)
            )  # fmt: skip
    _check(jobs)
    return jobs


def thinned(jobs: Sequence[Job], share: float) -> list[Job]:
    """About `share` of the jobs of each kind, evenly spaced, with the drawings that they refer to.

    Questions without a picture all stay: they cost no latent rows, and the last layer of the understanding expert is
    rounded by decoded words alone, of which a small set has too few otherwise.
    """
    kept: set[str] = set()
    for kind in ORDER:
        own = [job for job in jobs if job.kind == kind]
        wanted = min(len(own), max(1, round(len(own) * share))) if own else 0
        kept |= {own[i * len(own) // wanted].name for i in range(wanted)}
    kept |= {job.name for job in jobs if job.kind == "question" and not job.asked.picture}
    kept |= {job.asked.picture for job in jobs if job.name in kept}
    return [job for job in jobs if job.name in kept]


def latent_rows(jobs: Sequence[Job], stride: int) -> int:
    """About how many latent rows a set of these jobs has; `stride`: pixels of a picture's side per row."""
    sizes = {job.name: job.size for job in jobs}
    total = 0
    for job in jobs:
        if job.kind == "question":
            continue
        height, width = sizes.get(job.asked.picture, job.size)
        branches = 3 if job.asked.picture and job.flow.cfg_img_scale > 1 else 2
        total += (height // stride) * (width // stride) * (job.times * branches + bool(job.asked.picture))
    return max(1, total)


def _check(jobs: Sequence[Job]) -> None:
    names = [job.name for job in jobs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise CalibrationError(f"two calibration prompts are called {twice[0]!r}; names must differ.")
    drawn = {job.name for job in jobs if job.kind == "drawing"}
    for job in jobs:
        if job.asked.picture and job.asked.picture not in drawn:
            raise CalibrationError(
                f"calibration prompt {job.name} refers to a drawing {job.asked.picture!r}, which is not among the"
                " prompts; give the file with the drawings as well."
            )
