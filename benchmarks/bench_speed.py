"""What fewer evaluations cost: solvers and step caches on BAGEL-nano, against 50 points and the exact solution.

    python benchmarks/bench_speed.py [--seed 95000] [--pictures 40] [--scores]
    python benchmarks/bench_speed.py --model DIR --pictures 2     another model, drawings alone; `synth medium` shows
                                     --solvers --exact 200        that the mechanics do not depend on nano

Drawings and edits that no recipe, calibration set or choice was made with; fp32. `latent` is the error of the final
latent as a share of its way from the noise (the gate's latent.path), with a 95 % bootstrap interval over prompts;
`exact` the same against 1,000 (`--exact`) Euler points. Scores are those of the nano benchmark, paired. Settings were
chosen with seed 94000. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from paired_nano import ROUNDS, fresh

from bagel.events import Drawing, Listener, Step, StepInput
from bagel.sampler import Sampler
from bagel_compress.build.speed_settings import SpeedPreset
from bagel_compress.io.packaged import resource
from bagel_compress.run.load import open_model
from bagel_compress.scores.benchmark import Benchmark, compare, flow_of, request, run

SEED = 95_000
POINTS, EXACT = 50, 1000
HALF, THIRD = 26, 17  # points of half and a third of the evaluations of 50
SOLVERS = (
    *(SpeedPreset(num_timesteps=n, solver=s) for n in (HALF, THIRD) for s in ("euler", "ab2", "dpm2")),
    *(SpeedPreset(num_timesteps=n, solver="heun") for n in (14, 9)),
)
SETTINGS = (
    *SOLVERS,
    *(SpeedPreset(num_timesteps=POINTS, cache_every=k, cache_order=o) for k in (2, 3, 4) for o in (0, 1, 2)),
    *(SpeedPreset(num_timesteps=POINTS, cache_threshold=r) for r in (0.05, 0.1)),
    *(SpeedPreset(num_timesteps=POINTS, guidance_every=k) for k in (2, 3)),
    SpeedPreset(num_timesteps=POINTS, cache_every=2, guidance_every=2),
    SpeedPreset(num_timesteps=POINTS, cache_every=3, solver="ab2"),
)
SCORED = (
    SpeedPreset(num_timesteps=POINTS, cache_every=2),
    SpeedPreset(num_timesteps=POINTS, cache_every=4),
    SpeedPreset(num_timesteps=THIRD, solver="ab2"),
)


@dataclass(frozen=True, slots=True)
class Drawn:
    """Final latents and noise [prompts, N * C], passes of the network per picture, seconds of the processor."""

    latents: np.ndarray
    noise: np.ndarray
    passes: float
    seconds: float


class _Watch(Listener):
    noise: Sequence[torch.Tensor] = ()
    passes = 0

    def before_denoise(self, drawing: Drawing) -> None:
        self._drawing = drawing

    def before_step(self, work: StepInput) -> StepInput:
        if work.index == 0:
            self.noise = self._drawing.split(work.x)
        return work

    def after_step(self, step: Step) -> Step:
        self.passes += step.passes
        return step


def drawn(benchmark: Benchmark, sampler: Sampler, preset: SpeedPreset) -> Drawn:
    """Draws every prompt; those of one layout as one batch."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, prompt in enumerate(benchmark.prompts):
        groups.setdefault(prompt.layout, []).append(index)
    latents, noise, passes, begun = {}, {}, 0, time.process_time()
    for indexes in groups.values():
        watch, flow = _Watch(), preset.applied(flow_of(benchmark, benchmark.prompts[indexes[0]]))
        results = sampler.run_batch([request(benchmark, i) for i in indexes], flow=flow, listener=watch)
        for index, result, part in zip(indexes, results, watch.noise, strict=True):
            assert result.latent is not None
            latents[index], noise[index] = result.latent.numpy().ravel(), part.numpy().ravel()
        passes += watch.passes * len(indexes)
    order = sorted(latents)
    seconds = time.process_time() - begun
    return Drawn(np.stack([latents[i] for i in order]), np.stack([noise[i] for i in order]),
                 passes / len(order), seconds)  # fmt: skip


def path_errors(found: Drawn, wanted: Drawn) -> np.ndarray:
    """Error of each final latent as a share of the way from the noise."""
    error = np.linalg.norm(found.latents - wanted.latents, axis=1)
    return error / np.linalg.norm(wanted.latents - wanted.noise, axis=1)  # type: ignore[no-any-return]


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval."""
    rows = np.random.default_rng(0).integers(0, len(values), (ROUNDS, len(values)))
    low, high = np.quantile(values[rows].mean(1), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def scores(sampler: Sampler, benchmark: Benchmark) -> dict[str, list[dict[str, object]]]:
    """Paired differences of the scores of pictures to those of 50 official points."""

    def at(preset: SpeedPreset) -> Benchmark:
        return replace(benchmark, flows={name: preset.applied(flow) for name, flow in benchmark.flows.items()})

    reference = run(at(SpeedPreset(num_timesteps=POINTS)), sampler)
    found = {}
    for preset in SCORED:
        rows = compare(run(at(preset), sampler), reference)
        found[str(preset)] = [
            {"category": r.category, "prompts": r.prompts, "reference": r.reference, "delta": r.delta, "low": r.low,
             "high": r.high}
            for r in rows if r.category in ("one", "two", "edit")
        ]  # fmt: skip
        print(preset, json.dumps(found[str(preset)]), file=sys.stderr)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--pictures", type=int, default=40, help="drawings, and as many edits")
    parser.add_argument("--scores", action="store_true", help="also score 120 drawings and 60 edits")
    parser.add_argument("--model", metavar="DIR", help="in place of BAGEL-nano; no edits, no scores")
    parser.add_argument("--exact", type=int, default=EXACT, help="Euler points of the exact solution")
    parser.add_argument("--solvers", action="store_true", help="solvers alone, no caches")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sampler = open_model(args.model or resource("BAGEL-nano"), dtype=torch.float32)
    benchmark = fresh(args.seed, (args.pictures, 0, 0 if args.model else args.pictures, 0))
    official = drawn(benchmark, sampler, SpeedPreset(num_timesteps=POINTS))
    exact = drawn(benchmark, sampler, SpeedPreset(num_timesteps=args.exact))
    found = {}
    for preset in (SpeedPreset(num_timesteps=POINTS), *(SOLVERS if args.solvers else SETTINGS)):
        one = drawn(benchmark, sampler, preset)
        found[str(preset)] = {
            "passes": one.passes, "share": one.passes / official.passes, "seconds": one.seconds / official.seconds,
            "latent": interval(path_errors(one, official)), "exact": interval(path_errors(one, exact)),
        }  # fmt: skip
        print(preset, json.dumps(found[str(preset)]), file=sys.stderr, flush=True)
    scored = scores(sampler, fresh(args.seed + 1, (120, 0, 60, 0))) if args.scores and not args.model else {}
    print(
        json.dumps(
            {"benchmark": "bench_speed", "seed": args.seed, "exact": args.exact, "settings": found, "scores": scored}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
