"""Error against bytes of every format on BAGEL-nano: the figures of the chart in the demo's page and in the README.

    python benchmarks/nano_formats.py [--seed 98011] [--out bagel_compress/data/nano_formats.json]
    python benchmarks/nano_formats.py --chart            draws docs/nano_formats.svg of the figures that are there

Both experts' linears are in the format, everything else in bf16. Bits per weight are those at the released model's
shapes (small matrices add to some formats what large ones do not). Each format is measured with each weight rounded
alone and with calibrated rounding (gptq, refit, searched scales where a format has them); ecq, calibrated, at rates
from 2.5 to 8 bits. Prompts and errors are those of paired_nano.py, of a seed that nothing else uses; 15 minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from paired_nano import answers, fresh, path_errors, ratio

from bagel_compress.build.compress import compress
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.io.atomic import write_atomic
from bagel_compress.io.packaged import resource
from bagel_compress.report.format_chart import FIGURES, Figures, FormatFigure, chart_file
from bagel_compress.run.load import open_model
from bagel_compress.source.checkpoint import Checkpoint
from bagel_compress.source.released_header import TrueHeader

SEED = 98_011  # used nowhere else
CALIBRATED = "rounding: {method: gptq, refit: true}"
# Label -> codec with each weight rounded alone, and calibrated (None: the format cannot be).
FORMATS: dict[str, tuple[str, str | None]] = {
    "nf4": ("format: nf4, double_quant: true", "format: nf4, double_quant: true, scale: mse, "),
    "int4, group 32": ("format: int4, scale: mse", "format: int4, scale: mse, "),
    "int4, group 64": ("format: int4, scale: mse, group: 64", "format: int4, scale: mse, group: 64, "),
    "int4, group 32, zero points": ("format: int4, symmetric: false", None),
    "nvfp4": ("format: nvfp4, scale: mse", "format: nvfp4, scale: mse, "),
    "mxfp4": ("format: mxfp4, scale: mse", "format: mxfp4, scale: mse, "),
    "mxfp8": ("format: mxfp8", "format: mxfp8, "),
    "int8": ("format: int8", "format: int8, scale: mse, "),
    "fp8": ("format: fp8", "format: fp8, scale: mse, "),
}
RATES = (2.5, 3.0, 3.5, 4.13, 5.0, 6.0, 7.0, 8.0)
DOCS = Path(__file__).resolve().parents[1] / "docs"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=FIGURES)
    parser.add_argument("--chart", action="store_true", help="measure nothing, draw the chart again")
    args = parser.parse_args()
    if not args.chart:
        write_atomic(args.out, measure(args.seed).model_dump_json(indent=1) + "\n")
    write_atomic(DOCS / "nano_formats.svg", chart_file(Figures.load(args.out)))
    return 0


def measure(seed: int) -> Figures:
    """Every format on the same prompts; ratios are paired, to NF4 with each weight rounded alone."""
    torch.set_num_threads(1)
    source = resource("BAGEL-nano")
    checkpoint, benchmark = Checkpoint.open(source), fresh(seed)
    reference = answers(benchmark, open_model(source, dtype=torch.float32))
    base: np.ndarray | None = None
    found = []
    for label, rounding, codec in _variants():
        rules = f"[{{match: {{component: llm, kind: linear}}, codec: {codec}}}, {{match: {{}}, codec: raw}}]"
        recipe = Recipe.parse(f"{{name: measured, rules: {rules}}}", label)
        plan = make_plan(checkpoint, recipe)
        with TemporaryDirectory() as folder:
            artifact = compress(plan, checkpoint, Path(folder) / "artifact")
            own = answers(benchmark, open_model(artifact.path, dtype=torch.float32))
        errors = path_errors(own, reference)
        base = errors if base is None else base
        value, low, high = ratio(errors, base)
        same = float(np.mean([a == b for a, b in zip(own.texts, reference.texts, strict=True)]))
        found.append(
            FormatFigure(
                label=label, rounding=rounding, bits=round(_bits(recipe), 3), latent=float(errors.mean()),
                ratio=value, low=low, high=high, equal_texts=same,
            )
        )  # fmt: skip
        print(found[-1].model_dump_json(), file=sys.stderr, flush=True)
    counts = {"pictures": len(reference.latents), "texts": len(reference.texts)}
    print(json.dumps({"benchmark": "nano_formats", "seed": seed, **counts, "formats": len(found)}))
    return Figures(seed=seed, formats=tuple(found), **counts)


def _variants() -> list[tuple[str, str, str]]:
    """Label, rounding and codec; the first one is what ratios are to."""
    made = []
    for label, (plain, begun) in FORMATS.items():
        made.append((label, "nearest", f"{{{plain}}}"))
        if begun is not None:
            made.append((label, "gptq", f"{{{begun}{CALIBRATED}}}"))
    return made + [("ecq", "gptq", f"{{format: ecq, bits: {rate}, {CALIBRATED}}}") for rate in RATES]


def _bits(recipe: Recipe) -> float:
    """Stored bits per weight of the experts' linears at the released model's shapes (ecq: within 0.02)."""
    placements = [p for p in make_plan(TrueHeader(), recipe).placements if p.codec.format != "raw"]
    return 8 * sum(p.nbytes for p in placements) / sum(p.unit.numel for p in placements)


if __name__ == "__main__":
    sys.exit(main())
