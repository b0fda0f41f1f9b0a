"""The sampler on ONNX Runtime beside the sampler in torch, per denoising step, on the tiny and on a medium checkpoint.

    python benchmarks/bench_export_sampler.py [--rounds 5] [--models tiny medium] [--keep DIR]

The tiny checkpoint (`tests/data`, 128 x 128) runs on one thread, the medium one (`bagel-compress synth medium`, 0.24
billion decoder weights, 256 x 256) on all cores. Each form of the export is beside the torch sampler that somebody
would use otherwise: fp32 beside torch in fp32, int8 and int4 codes beside torch in bf16 and beside the same artifact in
torch. Samplers take turns; a ratio is that of the medians. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bagel.events import Listener, Step

TINY = Path(__file__).parents[1] / "tests/data/golden/checkpoint"
SIZES = {"tiny": (128, 128), "medium": (256, 256)}
STEPS = 6  # points of the schedule: five steps, the first of which is a warm-up
PAUSE = 0.25  # threads of the other library that wait for work keep its cores busy for a while
FORMS = ("fp32", "int8", "int4")
RECIPE = """
name: bench
rules:
  - match: {{component: llm, kind: linear}}
    codec: {codec}
  - match: {{}}
    codec: raw
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="ONNX Runtime sampler beside torch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--keep", type=Path, help="where checkpoints and exports lie, and are kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-sampler-") as scratch:
        result = {}
        for model in args.models:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # onnxruntime has one thread pool per process
                result[model] = pool.submit(
                    measure, model, tuple(args.forms), args.rounds, args.keep or Path(scratch)
                ).result()
            print(model, result[model], flush=True)
    print(json.dumps({"benchmark": "export_sampler", "cores": os.cpu_count(), **result}))


def measure(model: str, forms: tuple[str, ...], rounds: int, folder: Path) -> dict[str, Any]:
    """Median seconds of a step by sampler, and the ratios."""
    import torch

    from bagel.sampler import Sampler

    threads = 1 if model == "tiny" else os.cpu_count() or 1
    torch.set_num_threads(threads)
    source = checkpoint(model, folder)
    samplers = {
        "torch fp32": Sampler.from_dir(source, dtype=torch.float32),
        "torch bf16": Sampler.from_dir(source),
    }
    for form in forms:
        samplers |= exported(model, form, source, folder, threads)
    seconds = steps(samplers, SIZES[model], rounds)
    found: dict[str, Any] = {name: round(float(value), 5) for name, value in seconds.items()} | {"threads": threads}
    for form in forms:
        peers = ("torch fp32",) if form == "fp32" else ("torch bf16", f"torch {form}")
        found |= {f"ort {form} / {p}": round(float(seconds[f"ort {form}"] / seconds[p]), 3) for p in peers}
    return found


def checkpoint(model: str, folder: Path) -> Path:
    from bagel_compress.source.synthetic import synthesise

    if model == "tiny":
        return TINY
    if not (folder / model).exists():
        synthesise(model, folder / model, seed=0)
    return folder / model


def exported(model: str, form: str, source: Path, folder: Path, threads: int) -> dict[str, Any]:
    """The samplers of one form: ONNX Runtime, and the artifact in torch where there is one."""
    from bagel_compress.build.compress import compress
    from bagel_compress.build.manifest import MANIFEST
    from bagel_compress.build.plan import make_plan
    from bagel_compress.build.recipe import Recipe
    from bagel_compress.exporting.build import export
    from bagel_compress.exporting.manifest import MANIFEST as EXPORT
    from bagel_compress.exporting.ort_sampler import open_onnx
    from bagel_compress.exporting.source import WeightSource
    from bagel_compress.run.load import open_model
    from bagel_compress.run.target import Target
    from bagel_compress.source.checkpoint import Checkpoint

    build = folder / f"{model}-{form}"
    if form != "fp32" and not (build / MANIFEST).exists():
        opened = Checkpoint.open(source)
        compress(make_plan(opened, Recipe.parse(RECIPE.format(codec=form), "bench")), opened, build)
    graphs = folder / f"{model}-{form}-onnx"
    if not (graphs / EXPORT).exists():
        settings = {"precision": "fp32", "activations": "float" if form == "fp32" else "blocks"}
        target = {"name": "bench", "device": {"name": "CPU", "memory_mib": 1}, "export": settings}
        export(WeightSource.open(source if form == "fp32" else build), Target.model_validate(target), graphs)
    found: dict[str, Any] = {f"ort {form}": open_onnx(graphs, threads=threads)}
    return found if form == "fp32" else found | {f"torch {form}": open_model(build)}


class _Stamps(Listener):
    """When each step ended."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def after_step(self, step: Step) -> Step:
        self.seconds.append(time.perf_counter())
        return step


def steps(samplers: dict[str, Any], size: tuple[int, int], rounds: int) -> dict[str, float]:
    """Median seconds from step to step, without guidance: one pass a step."""
    import numpy as np

    from bagel.settings import FlowSettings

    flow = FlowSettings(num_timesteps=STEPS, cfg_text_scale=1.0)
    kept: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(rounds):
        for name, sampler in samplers.items():
            stamps = _Stamps()
            time.sleep(PAUSE)
            sampler.run(["a cat"], size=size, flow=flow, listener=stamps)
            kept[name] += list(np.diff(stamps.seconds))
    return {name: statistics.median(values) for name, values in kept.items()}


if __name__ == "__main__":
    main()
