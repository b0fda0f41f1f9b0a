"""Checks the presets of a recipe against its limits: every case with a picture is drawn in a free run with each preset.

Distances are measured from the reference's trace, so they include the error of the weights and that of the preset. A
preset changes no weight, so modules, velocities and texts are not compared again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from bagel.sampler import Sampler
from bagel_compress.build.limits import Limit
from bagel_compress.build.speed_settings import SpeedPreset
from bagel_compress.parity import replay
from bagel_compress.parity.distances import picture_distances
from bagel_compress.parity.extremes import middle
from bagel_compress.parity.report_data import PRESET, Row
from bagel_compress.parity.trace import Trace


def preset_rows(
    sampler: Sampler,
    presets: Mapping[str, SpeedPreset],
    limits: Mapping[str, Limit],
    traces: Sequence[Trace],
    progress: Callable[[str], None],
) -> Iterator[Row]:
    """Yields one row per preset and limit, or per preset, limit and case if the limit applies to each case alone."""
    drawn = [trace for trace in traces if "image" in trace.tensors]
    for name, preset in presets.items():
        found = {}
        for trace in drawn:
            progress(f"comparing {trace.case.name}, preset {name}")
            found[trace.case.name] = picture_distances(replay.rerun(sampler, trace, preset), trace)
        for metric, limit in limits.items():
            values = {case: distances[metric] for case, distances in found.items() if metric in distances}
            if limit.metric.over_cases_by_median:
                values = {"all": middle(values.values())} if values else {}
            for case, value in values.items():
                yield Row(
                    case=f"{case}{PRESET}{name}", metric=metric, value=value, floor=None, limit=limit.value,
                    source=limit.source, ok=limit.holds(value),
                )  # fmt: skip
