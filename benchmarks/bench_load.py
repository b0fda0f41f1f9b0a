"""Artifact to ready model on the CPU, beside plain reads of the same bytes, in one run.

    python benchmarks/bench_load.py [--source DIR | --artifacts DIR] [--work DIR] [--layers 2] [--repeat 3]

Without --source a synthetic checkpoint of the true shape with this many layers is written first, and compressed by
each recipe; --artifacts is a folder that holds the four artifacts already. Every figure is of a new process with the
files in the page cache and the libraries imported; the median of --repeat processes is shown.

    read           all bytes of the weights and the VAE into one buffer of 8 MB: nothing is kept
    read, kept     the same into memory that stays, as a loader that copies has to
    safetensors    safetensors.torch.load_file of every file
    open           open_model: a model that can run, its weights mapped and compared with the manifest, its census done
    open, trusted  the same without the comparison (`--trust`)
    open, touched  the same, and a byte of every page of every stored weight: what the first pass pays on top

RssAnon is what the process holds itself after opening, Python and the libraries included. Ends in one JSON line.
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
import time
from collections.abc import Callable
from pathlib import Path

FORMATS = {"nf4": "nf4-nearest", "fp8": "fp8-24gb", "int8": "int8-24gb", "df11": "df11"}
BUFFER = 1 << 23
PAGE = 4096


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="checkpoint folder (default: a synthetic one)")
    parser.add_argument("--artifacts", type=Path, help="folder of artifacts named after their recipes")
    parser.add_argument("--work", type=Path, help="where files are written (default: a temporary folder)")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--format", action="append", choices=tuple(FORMATS), help="only these")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(*args.child)
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        rows = {name: measured(folder, args.repeat) for name, folder in built(args, Path(work)).items()}
    columns = list(next(iter(rows.values())))
    print(f"{'':<6}" + "".join(f"{column:>15}" for column in columns), file=sys.stderr)
    for name, row in rows.items():
        print(f"{name:<6}" + "".join(f"{row[column]:>15}" for column in columns), file=sys.stderr)
    print(json.dumps({"bench": "load", "repeat": args.repeat, "cpus": os.cpu_count(), "rows": rows}))
    return 0


def built(args: argparse.Namespace, work: Path) -> dict[str, Path]:
    """An artifact of each format."""
    from bagel_compress.build.compress import compress
    from bagel_compress.build.plan import make_plan
    from bagel_compress.build.recipe import Recipe
    from bagel_compress.io.packaged import find_recipe
    from bagel_compress.source.checkpoint import Checkpoint
    from bagel_compress.source.synthetic import synthesise

    wanted = {name: recipe for name, recipe in FORMATS.items() if name in (args.format or FORMATS)}
    if args.artifacts is not None:
        return {name: args.artifacts / recipe for name, recipe in wanted.items()}
    source = args.source
    if source is None:
        source = work / "source"
        synthesise("7b-mot", source, seed=0, layers=args.layers)
    checkpoint, folders = Checkpoint.open(source), {}
    for name, recipe in wanted.items():
        print(f"building {recipe}", file=sys.stderr, flush=True)
        compress(make_plan(checkpoint, Recipe.load(find_recipe(recipe))), checkpoint, work / recipe)
        folders[name] = work / recipe
    if args.source is None:
        shutil.rmtree(source)
    return folders


def measured(folder: Path, repeat: int) -> dict[str, float]:
    """The medians of one artifact, and ratios to plain reads."""
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(repeat + 1):  # the first round warms the page cache
        for what in WAYS:
            done = subprocess.run(
                [sys.executable, __file__, "--child", what, str(folder)], check=True, capture_output=True, text=True
            )
            found.setdefault(what, []).append(json.loads(done.stdout.splitlines()[-1]))
    seconds = {what: statistics.median(run["seconds"] for run in runs[1:]) for what, runs in found.items()}
    return {
        "GB": round(sum(file.stat().st_size for file in weights(folder)) / 1e9, 2),
        **{what: round(value, 3) for what, value in seconds.items()},
        "open / read": round(seconds["open"] / seconds["read"], 2),
        "touched / kept": round(seconds["open, touched"] / seconds["read, kept"], 2),
        "RssAnon GB": round(statistics.median(run["anon"] for run in found["open"][1:]) / 1e6, 2),
    }


def child(what: str, folder: str) -> int:
    """One way, timed after the imports."""
    import safetensors.torch  # noqa: F401
    import torch

    import bagel.sampler  # noqa: F401
    import bagel_compress.run.load  # noqa: F401

    torch.set_num_threads(os.cpu_count() or 1)
    start = time.perf_counter()
    kept = WAYS[what](Path(folder))
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "anon": anonymous()}))
    del kept
    return 0


def weights(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def read(folder: Path) -> object:
    buffer = bytearray(BUFFER)
    for path in weights(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return buffer


def read_kept(folder: Path) -> object:
    return [path.read_bytes() for path in weights(folder)]


def load_files(folder: Path) -> object:
    from safetensors.torch import load_file

    return [load_file(path) for path in weights(folder)]


def opened(folder: Path) -> object:
    from bagel_compress.run.load import open_model

    return open_model(folder)


def opened_trusted(folder: Path) -> object:
    from bagel_compress.run.load import open_model

    return open_model(folder, trust=True)


def touched(folder: Path) -> object:
    """The model, and a byte of every page of its files, in a map of their own, so that each page is faulted in."""
    import numpy as np

    from bagel_compress.run.load import open_model

    sampler = open_model(folder)
    return sampler, [int(np.memmap(path, np.uint8, "r")[::PAGE].sum()) for path in weights(folder)]


WAYS: dict[str, Callable[[Path], object]] = {
    "read": read,
    "read, kept": read_kept,
    "safetensors": load_files,
    "open": opened,
    "open, trusted": opened_trusted,
    "open, touched": touched,
}


def anonymous() -> int:
    """RssAnon in kB; 0 where there is no /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


if __name__ == "__main__":
    sys.exit(main())
