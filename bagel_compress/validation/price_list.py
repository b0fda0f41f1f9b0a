"""Price list: the error and the time of sampler settings with fewer evaluations of the network, measured on a trace.

Every setting draws the pictures of a trace in free runs with the trace's noise. Distances are measured from the
reference's trace, as in validation, so they include the error of a build's weights. Settings that keep the limits are
proposed as presets for a recipe's `fast:` block.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import Field

from bagel.sampler import Sampler
from bagel_compress.budgets.latency import device_name
from bagel_compress.build.artifact import Artifact
from bagel_compress.build.limits import Limit, Metric, resolve
from bagel_compress.build.manifest import MANIFEST
from bagel_compress.build.speed_settings import SpeedPreset
from bagel_compress.errors import TargetError, TraceError
from bagel_compress.io.atomic import write_atomic
from bagel_compress.io.yaml_model import FrozenModel
from bagel_compress.parity import replay
from bagel_compress.parity.compare import Progress
from bagel_compress.parity.distances import picture_distances
from bagel_compress.parity.extremes import largest, middle, smallest
from bagel_compress.parity.report_data import Number
from bagel_compress.parity.trace import Trace, TraceFile, common_dtype
from bagel_compress.parity.verdict import preset_limits
from bagel_compress.report.svg import scatter, standalone
from bagel_compress.run.load import load, load_checkpoint
from bagel_compress.run.target import Target
from bagel_compress.scores.benchmark import Benchmark, Scores, compare, run
from bagel_compress.source.checkpoint import Checkpoint

OFFICIAL = SpeedPreset()
SHARES = (2, 3, 4)  # by default settings use a half, a third and a quarter of the evaluations
SECONDS = "seconds_per_image"  # in Price.broken: slower than the target's limit
BALANCED = 0.5  # the preset `balanced` may use this share of the limit of `latent.path`


class ScoreChange(FrozenModel):
    """How a score moves against the same model with the official sampler, prompt by prompt; points of 100."""

    prompts: int
    delta: float
    low: float  # 95 % interval
    high: float


class Price(FrozenModel):
    """A setting, with its time and its error over the pictures of a trace."""

    settings: SpeedPreset
    passes: float  # of the network, mean per picture; every branch counts
    seconds: float  # per picture, median: prefill, denoising and VAE
    latent: Number  # worst latent.path
    psnr: Number  # median image.psnr in dB
    scores: dict[str, ScoreChange] = Field(default_factory=dict)  # by category of a benchmark
    broken: tuple[str, ...] = ()  # metrics whose limits it breaks

    @property
    def name(self) -> str:
        return str(self.settings)


class PriceList(FrozenModel):
    """Prices of one model on one device. `presets` are the proposals for its recipe."""

    model: str
    device: str
    limits: dict[str, float]
    prices: tuple[Price, ...]
    presets: dict[str, SpeedPreset]

    def save(self, folder: Path) -> tuple[Path, Path]:
        """Writes speed.json and speed.svg (latent error against passes of the network) and returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        data, chart = folder / "speed.json", folder / "speed.svg"
        write_atomic(data, self.model_dump_json(indent=2))
        points = [(price.name, price.passes, price.latent) for price in self.prices]
        write_atomic(chart, standalone(scatter("latent error", "passes of the network per picture", points)))
        return data, chart

    def recipe_lines(self) -> str:
        """The presets as a recipe's `fast:` block."""
        lines = [
            f"  {name}: {{{', '.join(f'{k}: {v}' for k, v in preset.model_dump(exclude_defaults=True).items())}}}"
            for name, preset in self.presets.items()
        ]
        return "\n".join(["fast:", *lines])


def model_prices(
    model: str | Path,
    traces: Sequence[str | Path],
    level: str | None = None,
    device: torch.device | str = "cpu",
    target: Target | None = None,
    progress: Progress | None = None,
    benchmark: Benchmark | None = None,
) -> PriceList:
    """The price list of an artifact or a full-precision checkpoint, on traces of its source.

    `level` is the class of limits, by default the recipe's, or "8-bit" for a checkpoint. Settings slower than the
    seconds_per_image of `target` are marked as breaking it. The pictures of `benchmark` are drawn and scored with every
    setting. Raises TraceError on traces of another source, TargetError if the device is not the target's GPU.
    """
    files, device = [TraceFile.open(trace) for trace in traces], torch.device(device)
    dtype = common_dtype(files)
    name = device_name(device)
    if target is not None and target.budget.seconds_per_image is not None and name != target.device.name:
        raise TargetError(f"target {target.name} limits seconds on {target.device.name}; this is {name}.")
    if (Path(model) / MANIFEST).is_file():
        artifact = Artifact.open(model)
        limits, title = artifact.manifest.recipe.limits, artifact.manifest.recipe.name
        digest, level, overrides = artifact.manifest.source.digest, level or limits.level, limits.overrides
        sampler = load(artifact, device, None if dtype == torch.bfloat16 else dtype)
    else:
        checkpoint = Checkpoint.open(model)
        title, digest, level, overrides = checkpoint.name, checkpoint.digest, level or "8-bit", {}
        sampler = load_checkpoint(checkpoint, device, dtype)
    for file in files:
        file.expect_source(digest, str(model))
    chosen_limits = preset_limits(level, resolve(level, overrides))
    recorded = [file.read(case) for file in files for case in file.header.cases]
    seconds = None if target is None else target.budget.seconds_per_image
    found = price_list(sampler, title, recorded, chosen_limits, device=name, seconds=seconds, progress=progress)
    return found if benchmark is None else with_scores(found, sampler, benchmark, progress)


def candidates(points: int) -> tuple[SpeedPreset, ...]:
    """The default settings of a price list for cases with a schedule of `points`: solvers, step caches, guidance."""
    fewer = [(points - 1 + share - 1) // share + 1 for share in SHARES]
    return (
        OFFICIAL,
        *(SpeedPreset(num_timesteps=n, solver=solver) for n in fewer if n > 2 for solver in ("euler", "ab2", "dpm2")),
        *(SpeedPreset(cache_every=k, cache_order=o) for k in SHARES for o in (0, 1, 2)),
        *(SpeedPreset(cache_threshold=r) for r in (0.05, 0.1)),
        *(SpeedPreset(guidance_every=k) for k in (2, 3)),
        SpeedPreset(cache_every=2, guidance_every=2),
    )


def price_list(
    sampler: Sampler,
    name: str,
    traces: Sequence[Trace],
    limits: Mapping[str, Limit],
    settings: Sequence[SpeedPreset] = (),
    device: str = "",
    seconds: float | None = None,
    progress: Progress | None = None,
) -> PriceList:
    """Draws the pictures of the traces with every setting (default: `candidates`) and applies the limits.

    `seconds` is the limit for one picture. Raises TraceError if the traces hold no picture.
    """
    progress = progress or (lambda message: None)
    drawn = [trace for trace in traces if "image" in trace.tensors]
    if not drawn:
        raise TraceError("the traces hold no picture; record cases of kind t2i or edit.")
    replay.rerun(sampler, drawn[0])  # the first run of a process is slower
    prices = []
    for setting in settings or candidates(min(trace.case.flow.num_timesteps for trace in drawn)):
        progress(f"drawing with {setting}")
        price = _price(sampler, setting, drawn, limits)
        slow = seconds is not None and price.seconds > seconds
        prices.append(price.model_copy(update={"broken": (*price.broken, SECONDS)}) if slow else price)
    shown = {metric: limit.value for metric, limit in limits.items()}
    return PriceList(
        model=name, device=device, limits=shown, prices=tuple(prices), presets=choose_presets(prices, limits)
    )


def with_scores(
    found: PriceList, sampler: Sampler, benchmark: Benchmark, progress: Progress | None = None
) -> PriceList:
    """The list with how the scores of the benchmark's pictures move by each setting. Raises TraceError without any."""
    progress = progress or (lambda message: None)
    drawn = replace(benchmark, prompts=tuple(p for p in benchmark.prompts if p.output == "image" and not p.think))
    if not drawn.prompts:
        raise TraceError(f"benchmark {benchmark.name} has no prompt for a picture.")

    def scores(setting: SpeedPreset) -> Scores:
        progress(f"scoring {setting}")
        flows = {name: setting.applied(flow) for name, flow in drawn.flows.items()}
        return run(replace(drawn, flows=flows), sampler)

    reference, prices = scores(OFFICIAL), []
    for price in found.prices:
        rows = compare(reference if price.settings == OFFICIAL else scores(price.settings), reference)
        changes = {
            row.category: ScoreChange(
                prompts=row.prompts, delta=100 * row.delta, low=100 * row.low, high=100 * row.high
            )
            for row in rows
        }
        prices.append(price.model_copy(update={"scores": changes}))
    return found.model_copy(update={"prices": tuple(prices)})


def choose_presets(prices: Sequence[Price], limits: Mapping[str, Limit]) -> dict[str, SpeedPreset]:
    """The presets: `exact`, the official sampler; `fast`, the setting with the fewest passes that keeps every limit;
    `balanced`, the one with the fewest passes that uses at most half of the limit of `latent.path`.

    A preset is left out if no setting qualifies.
    """
    chosen = {"exact": OFFICIAL}
    passing = sorted((p for p in prices if not p.broken), key=lambda p: (p.passes, p.latent))
    limit = limits.get(Metric.LATENT_PATH)
    close = [p for p in passing if limit is None or p.latent <= BALANCED * limit.value]
    if close:
        chosen["balanced"] = close[0].settings
    if passing:
        chosen["fast"] = passing[0].settings
    return chosen


def _price(sampler: Sampler, setting: SpeedPreset, traces: Sequence[Trace], limits: Mapping[str, Limit]) -> Price:
    seconds, passes, distances = [], [], []
    for trace in traces:
        begun = time.perf_counter()
        with torch.no_grad():
            free = replay.rerun(sampler, trace, setting)
        seconds.append(time.perf_counter() - begun)
        passes.append(free.facts.passes)
        distances.append(picture_distances(free, trace))
    broken = []
    for metric, limit in limits.items():
        values = [d[metric] for d in distances if metric in d]
        worst = largest if limit.sense == "max" else smallest
        if values and not limit.holds((middle if limit.metric.over_cases_by_median else worst)(values)):
            broken.append(str(metric))
    return Price(
        settings=setting,
        passes=sum(passes) / len(passes),
        seconds=middle(seconds),
        latent=largest(d[Metric.LATENT_PATH] for d in distances),
        psnr=middle(d[Metric.IMAGE_PSNR] for d in distances),
        broken=tuple(broken),
    )
