"""File to file: how fast a checkpoint becomes an artifact, against `cp` of the same file, and in how much memory.

Every build runs in its own process on a warm page cache and includes what `cp` does not do: encoding, checking what was
written, digests of source and result, and waiting for the disk (fsync). `cp` is timed as it is (its data may still be
in the page cache when it returns) and with a sync. Rates count bf16 source bytes; CPU seconds are user and system time
of the whole process, which a busy machine changes less than the clock; memory is the peak of RssAnon. Right before each
clock starts a file as large as the source is written and deleted: a virtual machine gives memory back to its host a few
seconds after it was freed, and the first touch afterwards costs ten times what the second does (`cp` after a pause of 8
seconds took three times as long). One JSON line ends the output.

    python benchmarks/bench_build.py [--layers 2] [--repeat 2] [--source DIR] [--work DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

TINY = Path(__file__).parents[1] / "tests/data/golden/checkpoint"
RULES = "rules: [{{match: {{kind: [linear, head]}}, codec: {codec}}}, {{match: {{}}, codec: raw}}]"
CODECS = {
    "raw": "raw",
    "nf4": "{format: nf4}",
    "nf4 double_quant": "{format: nf4, double_quant: true}",
    "fp8": "fp8",
    "int8": "int8",
    "df11": "df11",
    "ecq": "{format: ecq, bits: 4.13}",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="decoder layers of the synthetic checkpoint (2: 5 GB)")
    parser.add_argument("--repeat", type=int, default=2, help="runs of each; the median counts")
    parser.add_argument("--source", type=Path, help="a checkpoint folder instead of a synthetic one")
    parser.add_argument("--work", type=Path, help="folder on the disk to measure (default: a temporary one)")
    parser.add_argument("--codec", action="append", choices=tuple(CODECS), help="only these")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(*args.child)
    work = Path(tempfile.mkdtemp(prefix="bench-build-", dir=args.work))
    try:
        print(json.dumps(measure(args, work)))
    finally:
        shutil.rmtree(work)
    return 0


def measure(args: argparse.Namespace, work: Path) -> dict[str, object]:
    source = args.source or synthetic(work, args.layers)
    weights = source / "ema.safetensors"
    nbytes = weights.stat().st_size
    runs: dict[str, list[dict[str, float]]] = {}
    for _ in range(args.repeat):
        for name in ("cp", "cp synced", *(args.codec or CODECS)):
            result = (
                copy([weights, source / "ae.safetensors"], work, name == "cp synced")
                if name.startswith("cp")
                else build(name, source, work)
            )
            runs.setdefault(name, []).append(result)
            print(f"{name:<17} {nbytes / 1e9 / result['seconds']:6.3f} GB/s {result}", file=sys.stderr, flush=True)
    seconds = {name: statistics.median(r["seconds"] for r in found) for name, found in runs.items()}
    rows = {
        name: {
            "gb_per_s": round(nbytes / 1e9 / seconds[name], 3),
            "of_cp": round(seconds["cp"] / seconds[name], 3),
            "of_cp_synced": round(seconds["cp synced"] / seconds[name], 3),
            **{key: found[0][key] for key in ("cpu_seconds", "bytes", "rss_anon_mb") if key in found[0]},
        }
        for name, found in runs.items()
    }
    columns = ("gb_per_s", "of_cp", "of_cp_synced", "cpu_seconds", "rss_anon_mb")
    print(f"\n{'':<17}" + "".join(f"{column:>13}" for column in columns), file=sys.stderr)
    for name, row in rows.items():
        print(f"{name:<17}" + "".join(f"{row.get(column, ''):>13}" for column in columns), file=sys.stderr)
    return {"bench": "build", "source_bytes": nbytes, "repeat": args.repeat, "cpus": os.cpu_count(), "rows": rows}


def synthetic(work: Path, layers: int) -> Path:
    from bagel_compress.source.synthetic import synthesise

    synthesise("7b-mot", work / "source", seed=0, layers=layers)
    return work / "source"


def prepare(weights: Path, work: Path) -> None:
    warm(weights)
    settle(work / "scratch", weights.stat().st_size)


def warm(path: Path) -> None:
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass


def settle(path: Path, nbytes: int) -> None:
    """Writes and deletes a file: the page cache has memory that was in use just now, and the disk is idle."""
    block = bytes(1 << 23)
    with path.open("wb", buffering=0) as file:
        for _ in range(0, nbytes, len(block)):
            file.write(block)
    path.unlink()
    os.sync()


def copy(files: list[Path], work: Path, synced: bool) -> dict[str, float]:
    """`cp` of what a build reads: the weights, and the VAE that it copies too."""
    target = work / "copy"
    target.mkdir()
    prepare(files[0], work)
    start, before = time.perf_counter(), os.times()
    subprocess.run(["cp", *map(str, files), str(target)], check=True)
    for path in target.iterdir() if synced else ():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    seconds, after = time.perf_counter() - start, os.times()
    shutil.rmtree(target)
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2)}


def build(name: str, source: Path, work: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", name, str(source), str(work)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    shutil.rmtree(work / "artifact")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def child(name: str, source: str, work: str) -> int:
    """One build, after a tiny one that loads the kernels; prints seconds, bytes and the peak of RssAnon."""
    from bagel_compress.build.compress import compress
    from bagel_compress.build.plan import make_plan
    from bagel_compress.build.recipe import Recipe
    from bagel_compress.source.checkpoint import Checkpoint

    recipe = Recipe.parse(f"name: bench\n{RULES.format(codec=CODECS[name])}", "bench")
    with tempfile.TemporaryDirectory() as folder:
        tiny = Checkpoint.open(TINY)
        compress(make_plan(tiny, recipe), tiny, Path(folder) / "tiny")
    prepare(Path(source) / "ema.safetensors", Path(work))
    peak, stop = [0], threading.Event()
    watcher = threading.Thread(target=watch, args=(peak, stop))
    watcher.start()
    checkpoint = Checkpoint.open(source)
    start, cpu = time.perf_counter(), time.process_time()
    artifact = compress(make_plan(checkpoint, recipe), checkpoint, Path(work) / "artifact")
    result = {
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "bytes": artifact.nbytes,
    }
    stop.set()
    watcher.join()
    print(json.dumps(result | {"rss_anon_mb": round(peak[0] / 1000)}))
    return 0


def watch(peak: list[int], stop: threading.Event) -> None:
    """Peak of RssAnon in kB; zero where there is no /proc."""
    status = Path("/proc/self/status")
    while status.exists() and not stop.wait(0.02):
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                peak[0] = max(peak[0], int(line.split()[1]))


if __name__ == "__main__":
    sys.exit(main())
