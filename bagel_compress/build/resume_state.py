"""The state of a build in its folder: one lock, one plan, one record per finished shard.

The state is in `.build/` inside the artifact's folder and is removed when the manifest has been written. A shard is
synced before its record is written, so an interrupted build can always continue with the first shard without a record.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from bagel.json_file import small_bytes
from bagel_compress.build.artifact import Artifact
from bagel_compress.build.manifest import MANIFEST, FileEntry, UnitEntry
from bagel_compress.build.plan import Plan
from bagel_compress.errors import ArtifactError
from bagel_compress.io.atomic import PARTIAL, write_atomic
from bagel_compress.io.byte_size import size_text
from bagel_compress.io.lock import remove_if_stale, take_lock
from bagel_compress.io.yaml_model import FrozenModel

STATE = ".build"


class ShardRecord(FrozenModel):
    """A finished shard."""

    file: FileEntry
    units: dict[str, UnitEntry]


@dataclass(frozen=True)
class BuildFolder:
    """A build's folder, locked by this process. Use it as a context manager; leaving it releases the lock."""

    out: Path
    plan: Plan

    def __enter__(self) -> BuildFolder:
        _refuse_foreign(self.out, self.plan)
        state = self.out / STATE
        state.mkdir(parents=True, exist_ok=True)
        take_lock(state / "lock", "built", ArtifactError)
        try:
            _refuse_foreign(self.out, self.plan)
            write_atomic(state / "plan.json", json.dumps({"plan": self.plan.digest}).encode())
            for leftover in self.out.glob(f"*{PARTIAL}"):
                leftover.unlink()
        except BaseException:
            (state / "lock").unlink()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        (self.out / STATE / "lock").unlink(missing_ok=True)

    def record(self, shard: str) -> ShardRecord | None:
        """The record of a finished shard whose file still exists with its size, else None."""
        path = self.out / STATE / f"{shard}.json"
        try:
            record = ShardRecord.model_validate_json(small_bytes(path))
        except (OSError, ValidationError):  # missing or damaged: the shard is built again
            return None
        file = self.out / shard
        return record if file.is_file() and file.stat().st_size == record.file.bytes else None

    def finish_shard(self, shard: str, record: ShardRecord) -> None:
        """Writes the record of a finished shard, which is then not built again."""
        write_atomic(self.out / STATE / f"{shard}.json", record.model_dump_json().encode())

    def check_space(self, nbytes: int) -> None:
        """Raises ArtifactError if the disk has less than `nbytes` free."""
        free = shutil.disk_usage(self.out).free
        if free < nbytes:
            raise ArtifactError(
                f"{self.out} needs {size_text(nbytes)} more, its disk has {size_text(free)} free; free"
                f" {size_text(nbytes - free)} or choose another disk (finished shards are kept)."
            )

    def clear(self) -> None:
        """Removes the state, after the manifest has been written."""
        shutil.rmtree(self.out / STATE)


def finished(out: Path, plan: Plan) -> Artifact | None:
    """The finished artifact of this plan in `out`; None if there is none."""
    if not (out / MANIFEST).exists():
        return None
    _refuse_foreign(out, plan)
    if (out / STATE).exists():  # the process ended after it wrote the manifest
        if (out / STATE / "lock").exists():
            remove_if_stale(out / STATE / "lock", "built", ArtifactError)
        shutil.rmtree(out / STATE)
    return Artifact.open(out)


def _refuse_foreign(out: Path, plan: Plan) -> None:
    """Raises ArtifactError if the folder holds anything but a build or artifact of this plan."""
    if out.exists() and not out.is_dir():
        raise ArtifactError(f"{out} is a file; choose a folder for the artifact.")
    for path, key in ((out / MANIFEST, "finished artifact"), (out / STATE / "plan.json", "begun build")):
        if path.exists():
            found = _plan_digest(path)
            if found != plan.digest:
                raise ArtifactError(
                    f"{out} holds the {key} of another plan ({found[:12]}, this one is {plan.digest[:12]}):"
                    " recipe, source or version differ; choose another folder or delete this one."
                )
            return
    others = [p.name for p in out.iterdir() if p.name != STATE] if out.is_dir() else []
    if others:
        raise ArtifactError(
            f"{out} is not empty ({sorted(others)[0]}) and holds no build; choose a new or empty folder."
        )


def _plan_digest(path: Path) -> str:
    try:
        return str(json.loads(small_bytes(path))["plan"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return "unreadable"
