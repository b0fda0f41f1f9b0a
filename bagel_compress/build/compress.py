"""Builds an artifact from a plan and its checkpoint, shard by shard, in bounded memory.

read -> encode -> (the codec decodes and compares) -> write. Writing, hashing of the source and finishing of the
previous shard run in threads of their own. The manifest's digests and errors come from the bytes that were read and
from the file that was written. An interrupted build continues with the first unfinished shard, and the result has the
same bytes.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from bagel_compress.build.artifact import Artifact
from bagel_compress.build.finite import FiniteValues
from bagel_compress.build.loader_configs import config_json, index_json, preprocessor_json
from bagel_compress.build.manifest import (
    MANIFEST,
    CalibrationEntry,
    FileEntry,
    Manifest,
    SourceEntry,
    StoredPart,
    TensorEntry,
    UnitEntry,
)
from bagel_compress.build.plan import Placement, Plan
from bagel_compress.build.resume_state import BuildFolder, ShardRecord, finished
from bagel_compress.build.shard_writer import ShardWriter, WrittenShard
from bagel_compress.codecs.base import Encoding, Reader
from bagel_compress.errors import ArtifactError, CalibrationError, CheckpointError
from bagel_compress.io.atomic import atomic_path, write_atomic
from bagel_compress.io.bf16 import as_words
from bagel_compress.io.digests import blake3_file, blocks, tensors_digest
from bagel_compress.io.safetensors_file import TensorFile
from bagel_compress.io.tensor_spec import PartSpec, TensorSpec
from bagel_compress.source.checkpoint import Checkpoint
from bagel_compress.source.identity import identity, tensor_digests

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

VAE = "ae.safetensors"
HASH_ELEMENTS = 1 << 22  # elements read at a time if a tensor has to be hashed separately from its encoding
UNHASHED = 4  # blocks that may wait to be hashed; converted blocks take memory
UNFINISHED = 2  # shards that may still be hashed and synced while the next one is encoded
SPARE = 64 << 20  # bytes of the disk left free for records, configs and the file system
Progress = Callable[[str, int], None]  # (name of a unit, bytes of the source that were encoded)


def compress(
    plan: Plan, checkpoint: Checkpoint, out: str | Path, progress: Progress | None = None, device: str = "cpu"
) -> Artifact:
    """Builds the artifact in the folder `out`, or continues an interrupted build of the same plan there.

    Weights are streamed: memory holds a few tensors, never the model. The bytes depend only on plan and source; with
    calibrated rounding also on the machine and torch's number of threads. `progress` is called with the name of each
    unit and the bytes of the source that it covers. `device` runs the layers of a calibrated build; other builds do not
    use it.

    Raises ArtifactError if the folder holds something else, is locked, or its disk is full; CodecError, naming the
    tensor, on values that a codec cannot represent; CheckpointError if the source is not the plan's or changes;
    CalibrationError if the plan needs a calibration set and has none, or one that does not suit it.

        checkpoint = bc.Checkpoint.open("my-fine-tune", base="BAGEL-7B-MoT")
        plan = bc.make_plan(checkpoint, bc.Recipe.load("nf4-12gb"))
        artifact = bc.compress(plan, checkpoint, "out/nf4")
    """
    out = Path(out)
    log.info("building %s of %s in %s", plan.recipe.name, plan.source_name, out)
    if checkpoint.fingerprint != plan.source_fingerprint:
        found, planned = checkpoint.fingerprint[:12], plan.source_fingerprint[:12]
        raise CheckpointError(f"this checkpoint ({found}) is not the one that was planned for ({planned}); plan again.")
    if plan.calibrated and plan.calibration is None:
        raise CalibrationError(
            f"recipe {plan.recipe.name} rounds by a calibration set, and none is given; make one with `bagel-compress"
            " calibrate --source SRC --out bagel.calibration.safetensors` and name it with --calibration, or build a"
            " recipe with nearest rounding such as nf4-nearest."
        )
    with _clean_disk_errors(out):
        done = finished(out, plan)
        if done is not None:
            _expect_same_source(done, checkpoint)
            return done
        with BuildFolder(out, plan) as build:
            artifact = _build(build, checkpoint, progress or (lambda unit, nbytes: None), device)
            build.clear()
    log.info("artifact %s is complete", out)
    return artifact


def _build(build: BuildFolder, checkpoint: Checkpoint, progress: Progress, device: str) -> Artifact:
    plan = build.plan
    records = {shard: record for shard in plan.shards if (record := build.record(shard)) is not None}
    bound = plan.nbytes if plan.sampled is None else plan.sampled
    build.check_space(bound - sum(record.file.bytes for record in records.values()) + checkpoint.vae.stamp[0] + SPARE)
    _expect_same_tensors(build, checkpoint, records)
    for record in records.values():
        for name, unit in record.units.items():
            progress(name, sum(TensorSpec(t.dtype, t.shape, n).nbytes for n, t in unit.tensors.items()))
    waiting: dict[str, Future[ShardRecord]] = {}
    calibrated = _calibrated(build, checkpoint, records, device)
    with (
        ShardWriter() as writer,
        ThreadPoolExecutor(1, "hash") as hashing,
        ThreadPoolExecutor(1, "record") as recording,
        ThreadPoolExecutor(1, "copy") as copying,
    ):
        copies = _start_copies(build, checkpoint, copying)
        for shard in plan.shards:
            if shard not in records:
                rounded = calibrated(shard)
                parts = _write_shard(build, shard, checkpoint, rounded, writer, hashing, progress)
                waiting[shard] = recording.submit(_record, build, shard, *parts)
            for name in list(waiting)[:-UNFINISHED]:
                records[name] = waiting.pop(name).result()
        records |= {shard: future.result() for shard, future in waiting.items()}
        files = {name: future.result() for name, future in copies.items()}
    return _finish(build, checkpoint, {shard: records[shard] for shard in plan.shards}, files)


def _expect_same_source(done: Artifact, checkpoint: Checkpoint) -> None:
    """Raises ArtifactError if a finished artifact was built from other values. Reads the whole checkpoint."""
    if checkpoint.digest != done.manifest.source.digest:
        raise ArtifactError(
            f"{done.path} holds the finished artifact of another checkpoint ({done.manifest.source.digest[:12]}, this"
            f" one is {checkpoint.digest[:12]}): some of its values differ; choose another folder or delete this one."
        )


def _expect_same_tensors(build: BuildFolder, checkpoint: Checkpoint, records: Mapping[str, ShardRecord]) -> None:
    """Raises ArtifactError if the finished shards were built from other values. Reads the tensors of these shards."""
    recorded = {
        name: t.blake3 for r in records.values() for unit in r.units.values() for name, t in unit.tensors.items()
    }
    specs = [spec for spec in checkpoint.specs if spec.name in recorded]
    found = tensor_digests(specs, checkpoint.bf16_words)
    other = next((name for name, digest in found.items() if digest != recorded[name]), None)
    if other is not None:
        raise ArtifactError(
            f"{build.out} holds shards of a build whose source has changed since ({other} differs);"
            " choose another folder or delete this one."
        )


def _calibrated(
    build: BuildFolder, checkpoint: Checkpoint, records: Mapping[str, ShardRecord], device: str
) -> Callable[[str], Mapping[str, Encoding]]:
    """A function from a shard to its encodings with calibrated rounding; they are empty without calibration."""
    if not build.plan.calibrated:
        return lambda shard: {}
    from bagel_compress.build.calibrated import CalibratedEncodings

    def finished_units(shard: str) -> Mapping[str, UnitEntry] | None:
        record = records.get(shard)
        return None if record is None else record.units

    return CalibratedEncodings(build.plan, checkpoint, build.out, finished_units, device).of_shard


def _write_shard(
    build: BuildFolder,
    shard: str,
    checkpoint: Checkpoint,
    rounded: Mapping[str, Encoding],
    writer: ShardWriter,
    hashing: ThreadPoolExecutor,
    progress: Progress,
) -> tuple[dict[str, UnitEntry], dict[str, Future[str]], Future[WrittenShard], dict[str, FiniteValues]]:
    """Encodes all units of a shard into its file. Returns entries, futures of the tensors' digests and of the file, and
    what has seen, when the file is complete, whether the tensors that are stored as they are have only finite values.

    `rounded` has the encodings that calibrated rounding has made already, by unit.
    """
    refused = build.plan.recipe.non_finite == "refused"
    reader = _HashingReader(checkpoint, hashing)
    begun = [  # the digest of a raw tensor is that of the written part
        (p, rounded.get(p.unit.name) or p.codec.begin(p.unit, checkpoint if p.codec.stored_as_is else reader))
        for p in build.plan.in_shard(shard)
    ]
    parts: dict[str, PartSpec] = {}
    for _, encoding in begun:
        parts |= encoding.parts
    kept = [part for _, encoding in begun if refused and encoding.codec.stored_as_is for part in encoding.parts]
    watched = {part: FiniteValues() for part in kept}  # codecs look at the values that they encode
    writer.begin(build.out / shard, parts, watched)
    units: dict[str, UnitEntry] = {}
    digests: dict[str, Future[str]] = {}
    for placement, encoding in begun:
        for chunk in encoding.chunks():
            writer.put(chunk)
        units[placement.unit.name] = _entry(placement, encoding, shard)
        if not placement.codec.stored_as_is:
            digests |= {spec.name: reader.digest(spec) for spec in placement.unit.specs}
        progress(placement.unit.name, sum(spec.nbytes for spec in placement.unit.specs))
    return units, digests, writer.end(), watched


def _entry(placement: Placement, encoding: Encoding, shard: str) -> UnitEntry:
    """The entry of an encoded unit, still without digests; these are known when the file has been read back."""
    lossless = encoding.codec.lossless or encoding.quality.noise == 0.0
    return UnitEntry(
        codec=encoding.codec,
        shard=shard,
        tensors={s.name: TensorEntry(dtype=s.dtype, shape=s.shape, blake3="") for s in placement.unit.specs},
        parts={name: StoredPart(dtype=p.dtype, shape=p.shape, blake3="") for name, p in encoding.parts.items()},
        snr_db=None if lossless else round(encoding.quality.snr_db, 4),
        reason=encoding.reason,
        rounded=encoding.rounded,
    )


def _record(
    build: BuildFolder,
    shard: str,
    units: dict[str, UnitEntry],
    digests: dict[str, Future[str]],
    written: Future[WrittenShard],
    watched: Mapping[str, FiniteValues],
) -> ShardRecord:
    """Waits for the digests of the tensors and for the finished file, and writes the shard's record.

    Raises CheckpointError if one of `watched` has seen NaN or infinity.
    """
    result = written.result()
    if (bad := next((part for part, values in watched.items() if not values.finite), None)) is not None:
        raise CheckpointError(
            f"{bad} holds NaN or infinity; mend the checkpoint, or say `non_finite: kept` in the recipe."
        )
    known = {name: digest.result() for name, digest in digests.items()}
    complete = {name: _with_digests(unit, known, result.parts) for name, unit in units.items()}
    record = ShardRecord(
        file=FileEntry(bytes=result.nbytes, blake3_tensors=tensors_digest(result.header, result.parts.values())),
        units=complete,
    )
    build.finish_shard(shard, record)
    return record


def _with_digests(unit: UnitEntry, tensors: dict[str, str], parts: dict[str, str]) -> UnitEntry:
    """The entries with their digests. The digest of a raw tensor is that of its part."""
    entries = {n: t.model_copy(update={"blake3": tensors.get(n) or parts[n]}) for n, t in unit.tensors.items()}
    stored = {name: part.model_copy(update={"blake3": parts[name]}) for name, part in unit.parts.items()}
    return unit.model_copy(update={"tensors": entries, "parts": stored})


def _finish(
    build: BuildFolder, checkpoint: Checkpoint, records: dict[str, ShardRecord], copies: dict[str, FileEntry]
) -> Artifact:
    """Writes the index, config.json and, last, the manifest."""
    plan, out = build.plan, build.out
    units = {name: unit for record in records.values() for name, unit in record.units.items()}
    stored = [(p.unit, units[p.unit.name].codec) for p in plan.placements]
    files = {shard: record.file for shard, record in records.items()} | copies
    weight_map = {part: unit.shard for unit in units.values() for part in unit.parts}
    total = sum(part.spec.nbytes for unit in units.values() for part in unit.parts.values())
    written = {"config.json": config_json(checkpoint.configs, stored)}
    if plan.recipe.serve:  # the server's loader reads only the files of the index
        weight_map |= dict.fromkeys(checkpoint.vae.tensors, next(n for n in copies if n.endswith("ae.safetensors")))
        total += sum(tensor.nbytes for tensor in checkpoint.vae.tensors.values())
        if "preprocessor_config.json" not in copies:
            written["preprocessor_config.json"] = preprocessor_json(checkpoint.configs["vit_config.json"])
    written["model.safetensors.index.json"] = index_json(weight_map, total)
    for name, content in written.items():
        write_atomic(out / name, content)
        files[name] = FileEntry(bytes=len(content), blake3=blake3(content).hexdigest())
    read = {name: t.blake3 for unit in units.values() for name, t in unit.tensors.items()}
    data = blake3("".join(f"{name} {digest}\n" for name, digest in sorted(read.items())).encode()).hexdigest()
    source = identity(checkpoint.specs, read, checkpoint.configs, {Path(n).name: f.blake3 for n, f in copies.items()})
    checkpoint.expect_unchanged()
    manifest = Manifest(
        tool=f"bagel-compress {version('bagel-compress')}",
        plan=plan.digest,
        source=SourceEntry.of(checkpoint, source, data),
        recipe=plan.recipe,
        recipe_digest=plan.recipe.digest,
        calibration=_calibration_entry(plan),
        units=units,
        files=dict(sorted(files.items())),
    )
    content = manifest.to_bytes()
    write_atomic(out / MANIFEST, content)
    return Artifact(out, manifest, hashlib.sha256(content).hexdigest())


def _calibration_entry(plan: Plan) -> CalibrationEntry | None:
    if plan.calibration is None:
        return None
    header, rows = plan.calibration.header, plan.calibration.rows
    return CalibrationEntry(
        digest=plan.calibration.digest, source=header.source, source_digest=header.source_digest,
        latents=header.latents, rows_und=rows.und, rows_gen=rows.gen,
    )  # fmt: skip


def _start_copies(build: BuildFolder, checkpoint: Checkpoint, pool: ThreadPoolExecutor) -> dict[str, Future[FileEntry]]:
    """Starts to copy tokenizer, configs and VAE."""
    refuses = build.plan.recipe.non_finite == "refused"
    apart = any(p.codec.scans_folder for p in build.plan.placements)
    targets = {name: f"vae/{VAE}" if apart and name == VAE else name for name in checkpoint.files}
    return {
        target: pool.submit(_copied, checkpoint.files[name], build.out / target, name == VAE and refuses)
        for name, target in targets.items()
        if name != "config.json"
    }


def _copied(source: Path, target: Path, is_finite: bool) -> FileEntry:
    """Copies a file atomically and syncs it. `is_finite`: it has tensors, which must not contain NaN or infinity."""
    with atomic_path(target) as partial:
        shutil.copyfile(source, partial)
        digest = _digest_of_finite(partial, source) if is_finite else blake3_file(partial)
        return FileEntry(bytes=partial.stat().st_size, blake3=digest)


def _digest_of_finite(path: Path, source: Path) -> str:
    """BLAKE3 of a file of tensors. Raises CheckpointError, naming the tensor of `source`, on NaN and infinity."""
    file, total = TensorFile.open(path), blake3()
    with path.open("rb", buffering=0) as opened:
        for block in blocks(opened, 8 + len(file.header)):
            total.update(block)
        for name, tensor in sorted(file.tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
            values = FiniteValues(tensor.dtype)
            for block in blocks(opened, tensor.nbytes):
                total.update(block)
                values.update(block)
            if not values.finite:
                raise CheckpointError(f"{source}: {name} holds NaN or infinity; copy it from the base model again.")
    return total.hexdigest()


class _HashingReader:
    """Reads the checkpoint for codecs, and hashes in the background the elements that are read in order."""

    def __init__(self, checkpoint: Reader, pool: ThreadPoolExecutor) -> None:
        self._checkpoint = checkpoint
        self._pool = pool  # of one thread, so that blocks are hashed in order
        self._totals: dict[str, blake3] = {}
        self._read: dict[str, int] = {}
        self._pending: deque[Future[blake3]] = deque()

    def read(self, spec: TensorSpec, start: int, stop: int) -> torch.Tensor:
        values = self._checkpoint.read(spec, start, stop)
        if self._read.get(spec.name, 0) == start:
            self._take(spec, values, stop)
        return values

    def digest(self, spec: TensorSpec) -> Future[str]:
        """blake3 of the whole tensor. Elements that were not read in order are read for it."""
        for start in range(self._read.get(spec.name, 0), spec.numel, HASH_ELEMENTS):
            stop = min(start + HASH_ELEMENTS, spec.numel)
            self._take(spec, self._checkpoint.read(spec, start, stop), stop)
        del self._read[spec.name]
        return self._pool.submit(self._totals.pop(spec.name).hexdigest)

    def _take(self, spec: TensorSpec, values: torch.Tensor, stop: int) -> None:
        total = self._totals.setdefault(spec.name, blake3())
        self._read[spec.name] = stop
        while len(self._pending) >= UNHASHED:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(total.update, as_words(values).view("uint8").data))


@contextmanager
def _clean_disk_errors(out: Path) -> Iterator[None]:
    """Inside, an error of a full or failing disk becomes an ArtifactError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ArtifactError(
                f"the disk of {out} is full; free some space and run the same command, it goes on from the last shard."
            ) from None
        raise ArtifactError(f"{out} cannot be written ({error}); check the disk and its permissions.") from None
