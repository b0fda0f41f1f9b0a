"""LPIPS and CLIP: metrics computed by networks. They are left out unless the user supplies the weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bagel_compress.build.limits import Metric
from bagel_compress.parity.clip import Clip
from bagel_compress.parity.lpips import SMALLEST, Lpips
from bagel_compress.parity.trace import Trace
from bagel_compress.run.case import Picture


@dataclass(frozen=True, slots=True)
class Networks:
    """The networks whose weights the user supplied; None for the others."""

    lpips: Lpips | None = None
    clip: Clip | None = None

    @classmethod
    def open(cls, lpips: str | Path | None, clip: str | Path | None) -> Networks:
        """Loads LPIPS from a file and CLIP from a folder; None leaves it out. Raises TraceError, MissingExtraError."""
        return cls(None if lpips is None else Lpips.open(lpips), None if clip is None else Clip.open(clip))

    @property
    def absent(self) -> dict[str, str]:
        """Metric that cannot be measured -> the command-line option that would supply its weights."""
        absent: dict[str, str] = {} if self.lpips else {Metric.IMAGE_LPIPS: "--lpips FILE"}
        return absent | ({} if self.clip else {Metric.IMAGE_CLIP_DROP: "--clip DIR"})

    def metrics(self, found: Trace, reference: Trace) -> dict[str, float]:
        """The network metrics of a free run's picture; empty if the case draws none."""
        if "image" not in reference.tensors:
            return {}
        a, b = found.tensors["image"], reference.tensors["image"]
        values: dict[str, float] = {}
        if self.lpips is not None and min(b.shape[:2]) >= SMALLEST:
            values[Metric.IMAGE_LPIPS] = self.lpips(a, b)
        if self.clip is not None:
            prompt = " ".join(turn for turn in reference.case.turns if not isinstance(turn, Picture))
            values[Metric.IMAGE_CLIP] = self.clip(a, prompt)
            values[Metric.IMAGE_CLIP_DROP] = self.clip(b, prompt) - values[Metric.IMAGE_CLIP]
        return values
