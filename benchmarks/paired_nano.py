"""Paired comparison of builds of BAGEL-nano on prompts that nothing else asks: final latents and texts.

    python benchmarks/paired_nano.py nf4-official nf4-nearest nf4 [--source DIR] [--calibration FILE] [--seed 93000]

Weights are decoded and computed in fp32, as in nano_table.py. The error of a picture is that of its final latent, as a
share of the way from the noise (the gate's `latent.path`). Ratios are of the means over prompts, to the first recipe,
with a 95 % bootstrap interval over prompts; `trimmed` leaves out the two prompts of the largest errors. Prompts of the
calibration set are left out, and no plan is asked for twice: there are 134 such prompts. A plan chooses among places
and backgrounds that are nearly equally likely, so its words say little: beside the builds stand the texts of the
original itself when it is computed in bf16, the largest gap between the words where texts part, and how much the
distributions of words differ.

Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from bagel.events import Drawing, Listener, StepInput
from bagel.nano import language
from bagel.sampler import Sampler
from bagel_compress.build.compress import compress
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.calibrate.calibration_set import CalibrationSet
from bagel_compress.calibrate.prompts import load_jobs
from bagel_compress.io.packaged import find_recipe, resource
from bagel_compress.parity.metrics import kl_divergence
from bagel_compress.run.load import open_model
from bagel_compress.scores.benchmark import Benchmark, flow_of, request
from bagel_compress.scores.nano import nano_benchmark
from bagel_compress.source.checkpoint import Checkpoint

SEED = 93_000  # used nowhere else; recipes were chosen with 91000
COUNTS = (40, 56, 40, 24)  # drawings, questions, edits, plans
PLANS = 4000  # draws, among which is every prompt that there is for a plan
ROUNDS = 4000
TRIMMED = 2


@dataclass(frozen=True, slots=True)
class Answers:
    """Final latents of pictures [prompts, N, C] with their noise, and texts with the logits [T, V] of their words, in
    the order of the prompts."""

    latents: np.ndarray
    noise: np.ndarray
    texts: tuple[str, ...]
    logits: tuple[torch.Tensor, ...]


def fresh(seed: int, counts: tuple[int, int, int, int] = COUNTS) -> Benchmark:
    """The nano benchmark of another seed, without prompts that the packaged calibration set was made with.

    Plans differ in their prompts; where more are wanted than there are, all there are.
    """
    known = {job.asked.prompt for job in load_jobs([resource("exports") / "calibration" / "nano"])}
    draw, ask, edit, think = counts
    made = nano_benchmark(2 * draw, ask, edit, PLANS if think else 0, seed)
    left = {"draw": draw, "ask": ask, "edit": edit, "think": think}
    kept = []
    for prompt in made.prompts:
        kind = prompt.kind.partition(".")[0]
        if left[kind] and (kind in ("ask", "edit") or prompt.turns[-1] not in known):
            left[kind] -= 1
            kept.append(prompt)
            if kind == "think":
                known.add(str(prompt.turns[-1]))
    return Benchmark(made.name, tuple(kept), made.score, made.flows, made.text, made.seed)


@torch.no_grad()
def answers(benchmark: Benchmark, sampler: Sampler) -> Answers:
    """Runs all prompts; those of one layout as one batch."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, prompt in enumerate(benchmark.prompts):
        groups.setdefault(prompt.layout, []).append(index)
    latents: dict[int, np.ndarray] = {}
    noises: dict[int, np.ndarray] = {}
    texts: dict[int, str] = {}
    logits: dict[int, torch.Tensor] = {}
    for indexes in groups.values():
        first, watch = benchmark.prompts[indexes[0]], _Watch()
        found = sampler.run_batch(
            [request(benchmark, index) for index in indexes],
            output=first.output,
            think=first.think,
            flow=flow_of(benchmark, first),
            text=benchmark.text,
            listener=watch,
        )
        texts |= {i: result.text for i, result in zip(indexes, found, strict=True) if result.text is not None}
        logits |= {i: torch.stack(watch.words[k]) for k, i in enumerate(indexes) if i in texts}
        if first.output == "image" and not first.think:
            latents |= {i: result.latent.numpy() for i, result in zip(indexes, found, strict=True)}  # type: ignore[union-attr]
            noises |= {i: part.numpy() for i, part in zip(indexes, watch.noise, strict=True)}
    pictures = sorted(latents)
    return Answers(
        np.stack([latents[i] for i in pictures]),
        np.stack([noises[i] for i in pictures]),
        tuple(texts[i] for i in sorted(texts)),
        tuple(logits[i] for i in sorted(texts)),
    )


class _Watch(Listener):
    """The noise that each picture began with, and the logits of each sample's words."""

    noise: Sequence[torch.Tensor] = ()

    def __init__(self) -> None:
        self.words: dict[int, list[torch.Tensor]] = {}

    def logits(self, samples: Sequence[int], logits: torch.Tensor) -> None:
        for sample, row in zip(samples, logits, strict=True):
            self.words.setdefault(sample, []).append(row.float())

    def before_denoise(self, drawing: Drawing) -> None:
        self._drawing = drawing

    def before_step(self, work: StepInput) -> StepInput:
        if work.index == 0:
            self.noise = self._drawing.split(work.x)
        return work


def path_errors(candidate: Answers, reference: Answers) -> np.ndarray:
    """Error of each picture's final latent as a share of its way from the noise."""
    way = np.linalg.norm((reference.latents - reference.noise).reshape(len(reference.latents), -1), axis=1)
    return np.linalg.norm((candidate.latents - reference.latents).reshape(len(way), -1), axis=1) / way  # type: ignore[no-any-return]


def ratio(candidate: np.ndarray, base: np.ndarray, trimmed: int = 0, seed: int = 0) -> tuple[float, float, float]:
    """Ratio of the means over prompts and its 95 % bootstrap interval; without the `trimmed` largest of the two."""
    kept = np.argsort(np.maximum(candidate, base))[: len(base) - trimmed]
    a, b = candidate[kept], base[kept]
    drawn = np.random.default_rng(seed).integers(0, len(a), (ROUNDS, len(a)))
    ratios = a[drawn].mean(1) / b[drawn].mean(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(a.mean() / b.mean()), float(low), float(high)


def share_interval(count: int, total: int) -> tuple[float, float]:
    """95 % interval of a share by Wilson's formula (1927)."""
    z, share = 1.96, count / total
    middle, half = share + z * z / (2 * total), z * ((share * (1 - share) + z * z / (4 * total)) / total) ** 0.5
    return (middle - half) / (1 + z * z / total), (middle + half) / (1 + z * z / total)


def equal_texts(candidate: Answers, reference: Answers) -> dict[str, object]:
    """How alike the texts are: the share of equal ones with its interval, and the plans among them; the largest gap of
    those that differ, which is how much likelier the original holds its own word than the candidate's where they part;
    and the mean over words of KL(original || candidate) in nats, up to there."""
    same = [a == b for a, b in zip(candidate.texts, reference.texts, strict=True)]
    plans = [s for s, text in zip(same, reference.texts, strict=True) if language.parse_thoughts(text) is not None]
    gaps, divergences = [0.0], []
    for own, original in zip(candidate.logits, reference.logits, strict=True):
        length = min(len(own), len(original))
        parted = (own[:length].argmax(-1) != original[:length].argmax(-1)).nonzero().flatten().tolist()
        shared = slice(0, parted[0] + 1 if parted else length)
        divergences.append(kl_divergence(own[shared], original[shared]))
        if parted:
            p = original[parted[0]].softmax(-1)
            gaps.append(float(p.max() - p[own[parted[0]].argmax()]))
    return {
        "equal_texts": sum(same) / len(same),
        "equal_texts_interval": share_interval(sum(same), len(same)),
        "equal_plans": f"{sum(plans)} of {len(plans)}",
        "largest_gap": max(gaps),
        "words_kl": float(torch.cat(divergences).mean()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", help="recipe names or files; ratios are to the first")
    parser.add_argument("--source", type=Path, default=resource("BAGEL-nano"))
    parser.add_argument("--calibration", type=Path, help="set to use instead of the packaged one")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--counts", type=int, nargs=4, default=COUNTS, metavar=("DRAW", "ASK", "EDIT", "THINK"),
                        help=f"prompts of each kind (default {' '.join(map(str, COUNTS))})")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    checkpoint = Checkpoint.open(args.source)
    benchmark = fresh(args.seed, tuple(args.counts))
    reference = answers(benchmark, open_model(args.source, dtype=torch.float32))
    in_bf16 = equal_texts(answers(benchmark, open_model(args.source, dtype=torch.bfloat16)), reference)
    print("original in bf16", json.dumps(in_bf16), file=sys.stderr)
    given = None if args.calibration is None else CalibrationSet.open(args.calibration)
    found = {}
    base: np.ndarray | None = None
    for name in args.recipes:
        recipe = Recipe.load(find_recipe(name))
        with TemporaryDirectory() as folder:
            plan = make_plan(checkpoint, recipe, given)
            artifact = compress(plan, checkpoint, Path(folder) / "artifact")
            own = answers(benchmark, open_model(artifact.path, dtype=torch.float32))
        errors = path_errors(own, reference)
        base = errors if base is None else base
        found[recipe.name] = {
            "bytes": plan.nbytes,
            "latent": float(errors.mean()),
            "trimmed": float(np.sort(errors)[:-TRIMMED].mean()),
            "ratio": ratio(errors, base),
            "ratio_trimmed": ratio(errors, base, TRIMMED),
            **equal_texts(own, reference),
        }
        print(recipe.name, json.dumps(found[recipe.name]), file=sys.stderr)
    counts = {"pictures": len(reference.latents), "texts": len(reference.texts)}
    print(
        json.dumps(
            {"benchmark": "paired_nano", "seed": args.seed, **counts, "original_in_bf16": in_bf16, "recipes": found}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
