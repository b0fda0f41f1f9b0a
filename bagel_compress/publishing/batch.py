"""Builds several recipes for several checkpoints, as independent jobs that a YAML file lists.

A job builds one artifact and verifies it. Jobs share nothing, so they run in this process, in several processes, or on
a Ray cluster (extra `ray`; paths have to be the same on every node), and give the same bytes. A finished job is
skipped, an interrupted one continues, as builds do, and a failed one does not stop the others.

    out: out/family
    sources:
      - {name: echo, path: checkpoints/echo-4o, base: ByteDance-Seed/BAGEL-7B-MoT}
      - {name: mine, path: ByteDance-Seed/BAGEL-7B-MoT, lora: my-adapter}
    recipes: [nf4-12gb, recipes/my.yaml]

Paths are relative to the file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, PrivateAttr, model_validator

from bagel_compress.errors import BagelCompressError, RecipeError
from bagel_compress.io.atomic import write_atomic
from bagel_compress.io.byte_size import size_text
from bagel_compress.io.jobs import Executor, run_jobs
from bagel_compress.io.safe_paths import exists, is_file
from bagel_compress.io.yaml_model import FrozenModel, load_yaml

SUMMARY = "batch.json"


class SourceItem(FrozenModel):
    """A checkpoint of a batch."""

    name: str = Field(pattern=r"^[\w.-]+$")
    path: str  # folder, file or Hub id
    base: str | None = None  # checkpoint with what this one lacks
    lora: str | None = None  # folder of an adapter to merge


class BatchFile(FrozenModel):
    """The contents of a batch file."""

    out: str
    sources: tuple[SourceItem, ...] = Field(min_length=1)
    recipes: tuple[str, ...] = Field(min_length=1)
    _folder: str = PrivateAttr("")

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [source.name for source in self.sources]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two sources are called {twice[0]!r}")
        return self

    @classmethod
    def load(cls, path: Path) -> BatchFile:
        """Reads a YAML file. Raises RecipeError naming file and key if it is not valid."""
        batch = load_yaml(cls, path, "batch", RecipeError)
        batch._folder = str(path.resolve().parent)
        return batch

    @property
    def folder(self) -> str:
        """The folder of the file, to which its paths are relative."""
        return self._folder

    def jobs(self) -> list[BatchJob]:
        """One job for every source and recipe. Raises RecipeError if a recipe is missing or two have the same name."""
        from bagel_compress.build.recipe import Recipe
        from bagel_compress.io.packaged import find_recipe

        base = Path(self.folder)
        files = [find_recipe(str(base / name) if is_file(base / name) else name) for name in self.recipes]
        names = [Recipe.load(file).name for file in files]
        if len(set(names)) < len(names):
            raise RecipeError(f"two of the recipes are called {max(names, key=names.count)!r}; names must differ.")
        return [
            BatchJob(f"{s.name}--{name}", self._resolved(s.path), self._resolved(s.base), self._resolved(s.lora),
                str(file), str(base / self.out / f"{s.name}--{name}"))
            for s in self.sources
            for name, file in zip(names, files, strict=True)
        ]  # fmt: skip

    def _resolved(self, path: str | None) -> str | None:
        """The path relative to the file's folder, if it exists there; else the text as it is (a Hub id)."""
        if path is None:
            return None
        here = Path(self.folder) / path
        return str(here) if exists(here) else path


@dataclass(frozen=True)
class BatchJob:
    """One artifact to build. All fields are strings, so that a job can be sent to another process or machine."""

    name: str
    source: str | None
    base: str | None
    lora: str | None
    recipe: str
    out: str


@dataclass(frozen=True)
class BatchResult:
    """The result of a job."""

    job: str
    out: str
    artifact: str = ""  # sha256 of its manifest
    nbytes: int = 0
    seconds: float = 0.0
    resumed: bool = False  # the artifact existed before
    error: str | None = None  # why the job failed; None if it is done

    def to_json(self) -> dict[str, Any]:
        """Plain data for batch.json and --json."""
        return asdict(self)


def run_batch(
    batch: BatchFile,
    processes: int = 1,
    executor: Executor = "local",
    cluster: str | None = None,
    progress: Callable[[BatchResult], None] | None = None,
) -> list[BatchResult]:
    """Runs all jobs, writes their results to batch.json in the output folder, and returns them in order.

    `cluster` is the address of a running Ray cluster. Raises RecipeError on a recipe that is missing or a name that
    occurs twice, MissingExtraError without the extra `ray`.
    """
    jobs, results = batch.jobs(), []
    for result in run_jobs(run_job, jobs, processes, executor, cluster):
        results.append(result)
        if progress is not None:
            progress(result)
    content = json.dumps([result.to_json() for result in results], indent=1) + "\n"
    out = Path(batch.folder) / batch.out
    write_atomic(out / SUMMARY, content)
    return results


def run_job(job: BatchJob) -> BatchResult:
    """Builds and verifies one artifact. A BagelCompressError becomes the result's `error`; others are raised."""
    from bagel_compress.build.compress import compress
    from bagel_compress.build.plan import make_plan
    from bagel_compress.build.recipe import Recipe
    from bagel_compress.source.checkpoint import Checkpoint

    began, existed = time.monotonic(), (Path(job.out) / "manifest.json").exists()
    try:
        checkpoint = Checkpoint.open(str(job.source), job.base, job.lora)
        artifact = compress(make_plan(checkpoint, Recipe.load(job.recipe)), checkpoint, job.out)
        if not existed and (faults := artifact.verify()):
            return BatchResult(job.name, job.out, error=f"{job.out}: {faults[0]}")
    except BagelCompressError as error:
        return BatchResult(job.name, job.out, seconds=time.monotonic() - began, error=str(error))
    nbytes = sum(entry.bytes for entry in artifact.manifest.files.values())
    return BatchResult(job.name, job.out, artifact.digest, nbytes, round(time.monotonic() - began, 3), existed)


def summary(results: Sequence[BatchResult]) -> str:
    """The results as text: a line per job, and the number of finished jobs."""
    done = sum(r.error is None for r in results)
    return "\n".join([*map(line, results), f"{done} of {len(results)} done"])


def line(r: BatchResult) -> str:
    """The line of one job."""
    done = "exists" if r.resumed else "built"
    state = f"FAILED: {r.error}" if r.error else f"{done}  artifact {r.artifact[:12]}"
    return f"{r.job:<32}  {size_text(r.nbytes):>12}  {r.seconds:8.1f} s  {state}"
