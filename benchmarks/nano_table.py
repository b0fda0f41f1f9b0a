"""Every recipe on BAGEL-nano: bytes, errors, verdict, pictures, answers and scores; and what each component costs.

    python benchmarks/nano_table.py [--share N] [--out docs/nano_table.md]

Weights are coded and decoded by the codecs and computed in fp32, so that only the coding error is seen: the table says
what a format does to the model, not what a kernel does. A lossless build is checked for equal weights and not run.
Latent error and verdict are those of `validate` on the packaged cases, with the same fp32 weights.
Ends in one JSON line. Half an hour on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from nano_formats import CALIBRATED, FORMATS
from PIL import Image

from bagel import training
from bagel.images import resized
from bagel.inputs import to_tensor
from bagel.model import Bagel
from bagel.nano import language
from bagel.nano.scenes import Scene, render, sample_scene
from bagel.sampler import Sampler
from bagel_compress.build.compress import compress
from bagel_compress.build.limits import Metric, resolve
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.io.packaged import resource
from bagel_compress.nano_training.batches import images_to_tensor
from bagel_compress.parity.compare import Candidate as ComparedModel
from bagel_compress.parity.compare import compare as compare_traces
from bagel_compress.parity.metrics import kl_divergence, rel_l2
from bagel_compress.parity.record import record_cases
from bagel_compress.parity.trace import TraceFile
from bagel_compress.run.case import load_cases
from bagel_compress.run.load import open_model
from bagel_compress.scores.benchmark import Benchmark, Scores, compare, picture_psnr, run, same_answers
from bagel_compress.scores.nano import nano_benchmark
from bagel_compress.source.checkpoint import Checkpoint

SOURCE = Path(__file__).resolve().parents[1] / "bagel_compress" / "data" / "BAGEL-nano"
SHOWN = ("one", "two", "ask", "edit", "think")
# One part of the model coded, the rest untouched.
PARTS = {
    "both experts": "{component: llm, kind: linear}",
    "und expert": "{component: llm, kind: linear, expert: und}",
    "gen expert": "{component: llm, kind: linear, expert: gen}",
    "bridges": "{component: [latent, time, connector], kind: linear}",
    "ViT": "{component: vit, kind: linear}",
    "lm_head": "{kind: head}",
    "everything linear": "{kind: [linear, head]}",
}

PARTS_SHOWN = (
    *(("nf4", name) for name in PARTS),
    *(("int4", f"{which} expert") for which in ("und", "gen")),
    *((codec, "lm_head") for codec in ("fp8", "int8")),
)
CALIBRATED_SHOWN = ("int4, group 32", "mxfp4", "mxfp8", "int8", "fp8")  # without a recipe of their own


@dataclass(frozen=True, slots=True)
class Row:
    """One variant against the bf16 original."""

    name: str
    bytes: int
    latent: float  # error of the final latent over its way from the noise, free run, worst case: the gated value
    broken: tuple[str, ...]  # limits of the recipe that do not hold, in words
    velocity: float  # relative L2 of predicted velocities, teacher-forced
    kl: float  # mean KL of next-token distributions, teacher-forced, nats
    psnr: float  # dB of free-running pictures, median
    same: float  # share of equal texts
    scores: dict[str, tuple[float, float, float]]  # category -> value, low and high of the difference


class Probe:
    """A fixed teacher-forced batch: noised pictures and answers, and the original's outputs on it."""

    def __init__(self, sampler: Sampler, samples: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        generator = torch.Generator().manual_seed(seed)
        items: list[list[training.Item]] = []
        for _ in range(samples):
            scene = sample_scene(rng)
            pixels = images_to_tensor(render(scene)[None])
            side = pixels.shape[-1] // sampler.vae.config.downsample
            with torch.no_grad():
                noise = torch.randn((1, sampler.vae.config.z_channels, side, side), generator=generator)
                latent = sampler.vae.encode(pixels, noise)[0]
            draws = [float(d) for d in torch.randn(3, generator=generator)]
            items.append([training.TextItem(language.caption(scene)), *(training.LatentItem(latent, d) for d in draws)])
            seen = training.ViTItem(_vit_pixels(sampler, scene))
            for kind in language.kinds_for(scene)[:4]:
                question = language.question(scene, kind, rng)
                items.append([seen, training.TextItem(question.text), training.TextItem(question.answer, loss=True)])
        self._batch = training.pack(sampler.bagel, sampler.text, items)
        self._noise = torch.randn(self._batch.latents.shape, generator=generator)
        self.velocity, self.logits = self.outputs(sampler.bagel)

    @torch.no_grad()
    def outputs(self, model: Bagel) -> tuple[torch.Tensor, torch.Tensor]:
        """Velocities of the noised tokens and logits of the answers' tokens."""
        hidden = training.forward(model, self._batch, self._noise).hidden
        return model.llm2vae(hidden[self._batch.mse_rows]), model.lm_head(hidden[self._batch.ce_rows])


@dataclass(frozen=True, slots=True)
class Subject:
    """The original, and what it did."""

    checkpoint: Checkpoint
    original: Sampler
    probe: Probe
    benchmark: Benchmark
    reference: Scores
    trace: TraceFile


def _vit_pixels(sampler: Sampler, scene: Scene) -> torch.Tensor:
    return to_tensor(resized(Image.fromarray(render(scene)), sampler.bagel.config.vit_rule))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=SOURCE)
    parser.add_argument("--out", type=Path, help="Markdown file to write (default: standard output)")
    parser.add_argument("--share", type=int, default=1, help="use one prompt in SHARE (default 1: all)")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    share = args.share
    benchmark = nano_benchmark(240 // share, 168 // share, 100 // share, 60 // share)
    checkpoint = Checkpoint.open(args.source)
    original = open_model(args.source, dtype=torch.float32)
    cases = load_cases([resource("exports") / "cases" / "nano"])
    folder = TemporaryDirectory()
    trace = record_cases(original, checkpoint.name, "", cases, Path(folder.name) / "reference.trace.safetensors")
    subject = Subject(checkpoint, original, Probe(original, 32, seed=7), benchmark, run(benchmark, original), trace)
    recipes = [Recipe.load(path) for path in sorted(resource("recipes").glob("*.yaml"))]
    rows, parts, calibrated = [], [], []
    for recipe in recipes:
        rows.append(_row(recipe, subject))
        print(f"{rows[-1].name}: {rows[-1].psnr:.1f} dB {'; '.join(rows[-1].broken)}", file=sys.stderr)
    for codec, name in PARTS_SHOWN:
        row = _row(Recipe.parse(_partial(PARTS[name], codec), "table"), subject)
        parts.append(replace(row, name=f"{codec.upper()} {name}"))
        print(f"{parts[-1].name}: {parts[-1].psnr:.1f} dB", file=sys.stderr)
    for name in CALIBRATED_SHOWN:
        _, codec = FORMATS[name]
        row = _row(Recipe.parse(_partial(PARTS["both experts"], f"{{{codec}{CALIBRATED}}}"), "table"), subject)
        calibrated.append(replace(row, name=f"{name}, calibrated"))
        print(f"{calibrated[-1].name}: {calibrated[-1].psnr:.1f} dB", file=sys.stderr)
    text = _markdown(rows, parts, calibrated, subject)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    else:
        print(text)
    print(json.dumps({"benchmark": "nano_table", "prompts": len(benchmark.prompts), **_summary(rows)}))
    return 0


def _partial(match: str, codec: str) -> str:
    return f"{{name: part, rules: [{{match: {match}, codec: {codec}}}, {{match: {{}}, codec: raw}}]}}"


def _row(recipe: Recipe, subject: Subject) -> Row:
    plan = make_plan(subject.checkpoint, recipe)
    with TemporaryDirectory() as folder:
        artifact = compress(plan, subject.checkpoint, Path(folder) / "artifact")
        nbytes = artifact.nbytes
        sampler = open_model(artifact.path, dtype=torch.float32)
        limits = resolve(recipe.limits.level, recipe.limits.overrides)
        judged = ComparedModel(sampler, recipe.name, "", recipe.limits.level, limits)
        report = compare_traces(judged, [subject.trace]).report
        scores = subject.reference
        if all(placement.codec.lossless for placement in plan.placements):
            wanted = subject.original.bagel.state_dict()
            assert all(torch.equal(wanted[n], t) for n, t in sampler.bagel.state_dict().items()), recipe.name
        else:
            scores = run(subject.benchmark, sampler)
        velocity, logits = subject.probe.outputs(sampler.bagel)
    differences = {d.category: d for d in compare(scores, subject.reference)}
    return Row(
        recipe.name,
        nbytes,
        max(case.metrics[Metric.LATENT_PATH] for case in report.cases if Metric.LATENT_PATH in case.metrics),
        report.broken,
        rel_l2(velocity, subject.probe.velocity),
        float(kl_divergence(logits, subject.probe.logits).mean()),
        float(np.median(picture_psnr(scores, subject.reference))),
        same_answers(scores, subject.reference),
        {name: (differences[name].candidate, differences[name].low, differences[name].high) for name in SHOWN},
    )


def _markdown(rows: list[Row], parts: list[Row], calibrated: list[Row], subject: Subject) -> str:
    lines = [
        f"Scores in percent over {len(subject.benchmark.prompts)} prompts; in brackets the 95 % interval of the paired",
        "difference to bf16. PSNR is the median over all pictures, to what the original draws from the same noise; the",
        "latent error is the worst case of `validate`, `limits` says whether the recipe's own hold.",
        "",
        *_head(),
        _original(subject),
        *(_line(row, "broken" if row.broken else "held") for row in rows),
        "",
        "One part of the model coded, everything else untouched (INT4 is symmetric in blocks of 32):",
        "",
        *_head(),
        _original(subject),
        *(_line(row, "") for row in parts),
        "",
        "Both experts in a format with calibrated rounding (gptq, refit), everything else untouched:",
        "",
        *_head(),
        _original(subject),
        *(_line(row, "") for row in calibrated),
    ]
    return "\n".join(lines) + "\n"


def _original(subject: Subject) -> str:
    return (
        "| bf16 original | | | | | | | | " + " | ".join(f"{100 * subject.reference.mean(n):.1f}" for n in SHOWN) + " |"
    )


def _head() -> list[str]:
    names = ["variant", "MB", "latent error", "limits", "velocity error", "logits KL", "PSNR dB", "equal texts", *SHOWN]
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]


def _line(row: Row, verdict: str) -> str:
    scores = [f"{100 * v:.1f} ({100 * low:+.1f}..{100 * high:+.1f})" for v, low, high in row.scores.values()]
    psnr = "equal" if math.isinf(row.psnr) else f"{row.psnr:.1f}"
    cells = [
        row.name,
        f"{row.bytes / 1e6:.2f}",
        f"{row.latent:.4f}",
        verdict,
        f"{row.velocity:.4f}",
        f"{row.kl:.1e}" if row.kl else "0",
        psnr,
        f"{100 * row.same:.1f}",
    ]
    return "| " + " | ".join([*cells, *scores]) + " |"


def _summary(rows: list[Row]) -> dict[str, dict[str, Any]]:
    return {
        row.name: {
            "mb": row.bytes / 1e6,
            "psnr": None if math.isinf(row.psnr) else row.psnr,
            "latent": row.latent,
            "broken": list(row.broken),
            "velocity": row.velocity,
            "equal_texts": row.same,
            "edit": row.scores["edit"][0],
        }
        for row in rows
    }


if __name__ == "__main__":
    sys.exit(main())
