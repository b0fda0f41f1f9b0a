"""Builds: exact sizes, the library's bytes, resume, refusals, and a manifest that verifies."""

from __future__ import annotations

import errno
import gc
import json
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3
from pipeline_data import Write, folder_bytes
from safetensors.torch import load_file, save_file

from bagel_compress.build import resume_state, shard_writer
from bagel_compress.build.artifact import Artifact
from bagel_compress.build.compress import Progress, compress
from bagel_compress.build.manifest import MANIFEST
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.codecs.base import Chunk
from bagel_compress.errors import ArtifactError, CheckpointError, CodecError
from bagel_compress.io import lock
from bagel_compress.io.safetensors_file import TensorFile
from bagel_compress.io.tensor_spec import PartSpec
from bagel_compress.source.checkpoint import Checkpoint


class StoppedError(Exception):
    """Stands for whatever ends a build."""


def stop_after(units: int) -> Progress:
    left = [units]

    def progress(unit: str, nbytes: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise StoppedError

    return progress


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, tiny: Checkpoint) -> Path:
    """A finished nf4 artifact; not to be changed."""
    from pipeline_data import NF4

    out = tmp_path_factory.mktemp("built") / "a"
    compress(make_plan(tiny, Recipe.parse(NF4, "x")), tiny, out)
    return out


def test_a_raw_artifact_is_the_checkpoint(tiny: Checkpoint, raw: Recipe, tensors: dict, tmp_path: Path) -> None:
    plan = make_plan(tiny, raw)
    seen: list[int] = []
    artifact = compress(plan, tiny, tmp_path / "a", lambda unit, nbytes: seen.append(nbytes))
    assert sum(seen) == sum(spec.nbytes for spec in tiny.specs)
    assert artifact.verify() == []
    for shard, size in plan.shard_bytes.items():
        stored = load_file(tmp_path / "a" / shard)
        save_file(stored, tmp_path / "again.safetensors", metadata={"format": "pt"})
        assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "a" / shard).read_bytes()
        assert (tmp_path / "a" / shard).stat().st_size == size
        for name, tensor in stored.items():
            assert tensor.equal(tensors[name])
    for name in tensors:
        assert artifact.decode(name)[name].equal(tensors[name])
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    again = Checkpoint.open(_without_manifest(tmp_path / "a"))
    assert again.digest == tiny.digest


def _without_manifest(folder: Path) -> Path:
    (folder / MANIFEST).unlink()
    return folder


def test_planned_sizes_are_written_sizes(tiny: Checkpoint, nf4: Recipe, built: Path) -> None:
    plan = make_plan(tiny, nf4)
    assert {shard: (built / shard).stat().st_size for shard in plan.shards} == plan.shard_bytes


def test_two_builds_are_byte_identical(tiny: Checkpoint, nf4: Recipe, built: Path, tmp_path: Path) -> None:
    compress(make_plan(tiny, nf4), tiny, tmp_path / "b")
    assert folder_bytes(tmp_path / "b") == folder_bytes(built)


def test_a_finished_build_is_left_alone(tiny: Checkpoint, nf4: Recipe, built: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in built.iterdir()}
    assert compress(make_plan(tiny, nf4), tiny, built).path == built
    assert {p.name: p.stat().st_mtime_ns for p in built.iterdir()} == before


def test_the_manifest_knows_what_was_done(tiny: Checkpoint, nf4: Recipe, built: Path) -> None:
    artifact = Artifact.open(built)
    manifest = artifact.manifest
    assert manifest.recipe == nf4
    assert manifest.plan == make_plan(tiny, nf4).digest
    assert manifest.source.digest == tiny.digest
    assert manifest.unit_of.keys() == {spec.name for spec in tiny.specs}
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    entry = manifest.units[name]
    assert entry.codec.format == "nf4"
    spec = artifact.unit(name).specs[0]
    original = tiny.read(spec, 0, spec.numel).reshape(spec.shape).double()
    decoded = artifact.decode(name)[name].double()
    snr = 10 * torch.log10(original.square().sum() / (original - decoded).square().sum())
    assert entry.snr_db == pytest.approx(snr.item(), abs=0.01)
    assert manifest.units["llm2vae.weight"].snr_db is None
    assert entry.tensors[name].blake3 == blake3(tiny.bf16_words(name, 0, spec.numel).tobytes()).hexdigest()


@pytest.mark.parametrize("units", [0, 1, 2, 30, 80, 138])
def test_a_stopped_build_goes_on_and_ends_the_same(
    tiny: Checkpoint, nf4: Recipe, built: Path, tmp_path: Path, units: int
) -> None:
    plan = make_plan(tiny, nf4)
    with pytest.raises(StoppedError):
        compress(plan, tiny, tmp_path / "b", stop_after(units))
    with pytest.raises(ArtifactError, match="did not finish"):
        Artifact.open(tmp_path / "b")
    compress(plan, tiny, tmp_path / "b")
    assert folder_bytes(tmp_path / "b") == folder_bytes(built)


def test_finished_shards_are_not_built_again(tiny: Checkpoint, nf4: Recipe, tmp_path: Path) -> None:
    plan = make_plan(tiny, nf4)
    with pytest.raises(StoppedError):
        compress(plan, tiny, tmp_path / "b", stop_after(100))
    done = [shard for shard in plan.shards if (tmp_path / "b" / ".build" / f"{shard}.json").exists()]
    assert len(done) >= 2
    before = {shard: (tmp_path / "b" / shard).stat().st_mtime_ns for shard in done}
    compress(plan, tiny, tmp_path / "b")
    assert {shard: (tmp_path / "b" / shard).stat().st_mtime_ns for shard in done} == before


def test_another_plan_in_the_folder_is_refused_with_both_digests(
    tiny: Checkpoint, nf4: Recipe, raw: Recipe, built: Path, tmp_path: Path
) -> None:
    first, second = make_plan(tiny, nf4), make_plan(tiny, raw)
    with pytest.raises(
        ArtifactError, match=f"finished artifact of another plan .{first.digest[:12]}.*{second.digest[:12]}"
    ):
        compress(second, tiny, built)
    with pytest.raises(StoppedError):
        compress(first, tiny, tmp_path / "b", stop_after(50))
    before = folder_bytes(tmp_path / "b")
    with pytest.raises(ArtifactError, match=f"begun build of another plan .{first.digest[:12]}.*{second.digest[:12]}"):
        compress(second, tiny, tmp_path / "b")
    assert folder_bytes(tmp_path / "b") == before


def test_a_folder_with_other_things_is_refused(tiny: Checkpoint, raw: Recipe, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"not empty \(notes.txt\)"):
        compress(make_plan(tiny, raw), tiny, tmp_path)
    with pytest.raises(ArtifactError, match="is a file"):
        compress(make_plan(tiny, raw), tiny, tmp_path / "notes.txt")
    assert folder_bytes(tmp_path) == {"notes.txt": b"mine"}


def test_two_builds_in_one_folder(tiny: Checkpoint, raw: Recipe, tmp_path: Path) -> None:
    plan = make_plan(tiny, raw)

    def second(unit: str, nbytes: int) -> None:
        with pytest.raises(ArtifactError, match=f"is being built by process {os.getpid()}"):
            compress(plan, tiny, tmp_path / "a")
        raise StoppedError

    with pytest.raises(StoppedError):
        compress(plan, tiny, tmp_path / "a", second)
    assert not (tmp_path / "a" / ".build" / "lock").exists()


@pytest.mark.parametrize(
    ("holder", "refused"),
    [
        ({"pid": 2**22 + 1, "host": "here", "started": "1"}, False),  # over Linux's largest process number
        ({"pid": os.getpid(), "host": "here", "started": "-1"}, False),  # the number was given out again
        ({"pid": 1, "host": "elsewhere", "started": ""}, True),
        ("", True),  # just made by a process that has not written into it yet: two would build
    ],
)
def test_locks_of_the_dead(tiny: Checkpoint, raw: Recipe, tmp_path: Path, holder: dict | str, refused: bool) -> None:
    if isinstance(holder, dict) and holder["host"] == "here":
        holder["host"] = socket.gethostname()
    plan = make_plan(tiny, raw)
    with pytest.raises(StoppedError):
        compress(plan, tiny, tmp_path / "a", stop_after(3))
    (tmp_path / "a" / ".build" / "lock").write_text(json.dumps(holder) if holder else "")
    if refused:
        with pytest.raises(ArtifactError, match=r"process 1 on elsewhere|does not name a process"):
            compress(plan, tiny, tmp_path / "a")
    else:
        assert compress(plan, tiny, tmp_path / "a").verify() == []


def test_a_lock_that_another_process_took_meanwhile_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes find the lock of a dead one; the quicker one replaces it while the other still looks at it."""
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "lock"
    old, new = ({"pid": pid, "host": socket.gethostname(), "started": "1"} for pid in (2**22 + 1, os.getppid()))
    path.write_text(json.dumps(old))

    def slow(pid: int, started: str) -> bool:
        path.write_text(json.dumps(new))
        return pid == new["pid"]

    monkeypatch.setattr(lock, "is_alive", slow)
    with pytest.raises(ArtifactError, match=f"is being built by process {new['pid']}"):
        lock.take_lock(path, "built", ArtifactError)
    assert json.loads(path.read_text()) == new
    assert [file.name for file in path.parent.iterdir()] == ["lock"]


def test_too_little_space_is_found_before_the_first_byte(
    tiny: Checkpoint, raw: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = resume_state.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(resume_state.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ArtifactError, match=r"its disk has 0.001 MB free"):
        compress(make_plan(tiny, raw), tiny, tmp_path / "a")
    assert not list((tmp_path / "a").glob("*.safetensors*"))


def test_a_resumed_build_asks_for_what_is_left(
    tiny: Checkpoint, raw: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(resume_state.BuildFolder, "check_space", lambda build, nbytes: asked.append(nbytes))
    plan = make_plan(tiny, raw)
    with pytest.raises(StoppedError):
        compress(plan, tiny, tmp_path / "a", stop_after(60))
    kept = sum(
        p.stat().st_size
        for p in (tmp_path / "a").glob("model-*.safetensors")
        if (tmp_path / "a" / ".build" / f"{p.name}.json").exists()
    )
    compress(plan, tiny, tmp_path / "a")
    assert 0 < kept == asked[0] - asked[1]


def test_a_disk_that_fills_up_is_one_sentence_and_resumable(
    tiny: Checkpoint, nf4: Recipe, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(tiny, nf4)
    written = [0]
    original = shard_writer._OpenShard.write

    def full(shard: shard_writer._OpenShard, where: int, data: bytes | memoryview) -> None:
        written[0] += len(data)
        if written[0] > 400_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(shard, where, data)

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer._OpenShard, "write", full)
        with pytest.raises(ArtifactError, match="is full; free some space and run the same command"):
            compress(plan, tiny, tmp_path / "b")
    assert not (tmp_path / "b" / MANIFEST).exists()
    compress(plan, tiny, tmp_path / "b")
    assert folder_bytes(tmp_path / "b") == folder_bytes(built)


@pytest.mark.parametrize("fault", [errno.EOPNOTSUPP, errno.ENOSPC])
def test_blocks_that_the_file_system_does_not_give_in_advance(
    tiny: Checkpoint, nf4: Recipe, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int
) -> None:
    def refuse(handle: int, start: int, size: int) -> None:
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(shard_writer.os, "posix_fallocate", refuse, raising=False)
    if fault == errno.ENOSPC:
        with pytest.raises(ArtifactError, match="is full; free some space"):
            compress(make_plan(tiny, nf4), tiny, tmp_path / "b")
    else:
        compress(make_plan(tiny, nf4), tiny, tmp_path / "b")
        assert folder_bytes(tmp_path / "b") == folder_bytes(built)


def test_what_is_not_finite_is_named_and_refused_unless_the_recipe_keeps_it(
    write: Write, tensors: dict, raw: Recipe, nf4: Recipe, tmp_path: Path
) -> None:
    df11 = raw.model_copy(update={"rules": Recipe.load("df11").rules})
    name = "language_model.model.layers.1.mlp_moe_gen.down_proj.weight"
    for value in (float("nan"), float("-inf")):
        bad = dict(tensors)
        bad[name] = bad[name].clone()
        bad[name][3, 5] = value
        checkpoint = Checkpoint.open(write(bad, f"in{value}"))
        for recipe in (raw, nf4, df11):
            with pytest.raises((CodecError, CheckpointError), match=rf"{name}.* holds NaN or [Ii]nf"):
                compress(make_plan(checkpoint, recipe), checkpoint, tmp_path / f"refused{value}-{recipe.digest}")
        for recipe in (raw, df11):
            kept = recipe.model_copy(update={"non_finite": "kept"})
            artifact = compress(make_plan(checkpoint, kept), checkpoint, tmp_path / f"kept{value}-{recipe.digest}")
            found = artifact.decode(artifact.manifest.unit_of[name])[name]
            assert found.view(torch.int16).equal(bad[name].view(torch.int16))


def test_a_vae_that_is_not_finite_is_refused(write: Write, tensors: dict, raw: Recipe, tmp_path: Path) -> None:
    folder = write(tensors)
    vae = load_file(folder / "ae.safetensors")
    vae["decoder.conv_in.bias"][1] = float("nan")
    save_file(vae, folder / "ae.safetensors")
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match=r"decoder\.conv_in\.bias holds NaN"):
        compress(make_plan(checkpoint, raw), checkpoint, tmp_path / "a")


@pytest.mark.parametrize("recipe_name", ["raw", "nf4"])
def test_a_source_that_is_cut_while_it_is_read_is_one_sentence(
    recipe_name: str, write: Write, tensors: dict, tmp_path: Path, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A file that was mapped ended the process with SIGBUS."""
    folder = write(tensors)
    checkpoint = Checkpoint.open(folder)
    plan = make_plan(checkpoint, request.getfixturevalue(recipe_name))
    monkeypatch.setattr(TensorFile, "changed", lambda file: False)  # it was looked at just before
    os.truncate(folder / "ema.safetensors", 1 << 16)
    with pytest.raises(CheckpointError, match="was cut while it was read"):
        compress(plan, checkpoint, tmp_path / "a")
    assert not (tmp_path / "a" / MANIFEST).exists()


def test_a_plan_of_another_checkpoint(
    write: Write, tensors: dict, tiny: Checkpoint, raw: Recipe, tmp_path: Path
) -> None:
    other = dict(tensors)
    other["llm2vae.bias"] = other["llm2vae.bias"] + 1
    checkpoint = Checkpoint.open(write(other))
    with pytest.raises(CheckpointError, match="is not the one that was planned for"):
        compress(make_plan(tiny, raw), checkpoint, tmp_path / "a")


def test_a_source_that_changes_during_the_build(write: Write, tensors: dict, raw: Recipe, tmp_path: Path) -> None:
    folder = write(tensors)
    checkpoint = Checkpoint.open(folder)

    def touch(unit: str, nbytes: int) -> None:
        os.utime(folder / "ema.safetensors", ns=(7, 7))

    with pytest.raises(CheckpointError, match="was changed while it was read"):
        compress(make_plan(checkpoint, raw), checkpoint, tmp_path / "a", touch)
    assert not (tmp_path / "a" / MANIFEST).exists()


def test_the_writer_wants_every_byte_once(tmp_path: Path) -> None:
    data = np.arange(16, dtype=np.uint8)
    with shard_writer.ShardWriter() as out:
        out.begin(tmp_path / "x.safetensors", {"a": PartSpec("U8", (16,)), "b": PartSpec("BF16", (4,))})
        out.put(Chunk("a", 8, data[8:]))
        out.put(Chunk("b", 0, data[:8]))
        with pytest.raises(CodecError, match="lie outside"):
            out.put(Chunk("a", 9, data[8:]))
        with pytest.raises(CodecError, match="a: 8 of 16 bytes were coded"):
            out.end()
    assert not (tmp_path / "x.safetensors").exists()


def test_the_writer_takes_chunks_in_any_order_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "PIECE", 1000)
    a, b = (np.random.default_rng(i).integers(0, 256, size, dtype=np.uint8) for i, size in enumerate((5000, 4096)))

    def chunks() -> Iterator[Chunk]:
        yield Chunk("b", 2048, b[2048:], lasting=True)
        yield Chunk("a", 2500, a[2500:3600])
        yield Chunk("b", 0, b[:2048])
        yield Chunk("a", 3600, a[3600:], direct=True)
        yield Chunk("a", 0, a[:2500])

    with shard_writer.ShardWriter() as out:
        out.begin(tmp_path / "x.safetensors", {"a": PartSpec("U8", (5000,)), "b": PartSpec("F32", (1024,))})
        for chunk in chunks():
            out.put(chunk)
        out.end().result()
    save_file(
        {"a": torch.from_numpy(a), "b": torch.from_numpy(b).view(torch.float32)}, tmp_path / "y", {"format": "pt"}
    )
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y").read_bytes()


def test_a_fault_of_the_disk_that_is_asked_early_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults, real = [OSError(errno.EIO, os.strerror(errno.EIO))], os.fsync

    def sync(handle: int) -> None:  # a system reports a fault once
        if faults:
            raise faults.pop()
        real(handle)

    monkeypatch.setattr(shard_writer, "SYNC_BYTES", 1000)
    monkeypatch.setattr(shard_writer.os, "fsync", sync)
    data = np.zeros(4000, np.uint8)
    with shard_writer.ShardWriter() as out:
        out.begin(tmp_path / "x.safetensors", {"a": PartSpec("U8", (4000,))})
        out.put(Chunk("a", 0, data[:2000], direct=True))
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            _put_and_end(out, Chunk("a", 2000, data[2000:]))
    assert not (tmp_path / "x.safetensors").exists()


def _put_and_end(out: shard_writer.ShardWriter, chunk: Chunk) -> None:
    out.put(chunk)
    out.end().result()


def test_a_build_closes_its_files(tiny: Checkpoint, tmp_path: Path) -> None:
    """Windows renames no file that is open."""
    plan = make_plan(tiny, Recipe.parse("name: x\nrules: [{match: {}, codec: raw}]", "x"))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", ResourceWarning)
        compress(plan, tiny, tmp_path / "a")
        gc.collect()
    assert [str(w.message) for w in found if str(tmp_path) in str(w.message)] == []
