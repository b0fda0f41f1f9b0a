"""The first screen: which build fits a GPU. `advise` behind the page: its table, and the commands of a row.

A ranking takes seconds of computing for each candidate, so it is made when it is asked for, says which candidate it is
at, can be stopped, and is kept for the next visitor.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from bagel.errors import BagelError, Cancelled
from bagel_compress.app.texts import Texts
from bagel_compress.budgets.machine import Machine, found_targets
from bagel_compress.budgets.recommend import packaged_targets
from bagel_compress.errors import TargetError
from bagel_compress.run.target import GIB, Target

if TYPE_CHECKING:
    from bagel_compress.budgets.advise import Choice
    from bagel_compress.budgets.known_builds import KnownBuild

REHEARSAL = "nano"  # a target that is no GPU
MOST_GPUS = 8


class Advisor:
    """Rankings of this machine's page. `builds` are ranked beside the recipes."""

    def __init__(self, builds: Sequence[KnownBuild] = ()) -> None:
        self.machine = Machine.found()
        self.builds = builds
        self._known: dict[tuple[str, int], list[Choice]] = {}

    def targets(self) -> list[tuple[str, str]]:
        """What can be chosen: as it is shown, and its name."""
        named = packaged_targets().items()
        return [(f"{name}  ({target.device.name})", name) for name, target in named if name != REHEARSAL]

    def found(self) -> tuple[str | None, int]:
        """The target that the GPUs here are, and how many there are; None: there is none, or it is too small."""
        try:
            targets = found_targets(self.machine)
        except TargetError:
            return None, 1
        return min(targets, key=lambda target: target.limit).name, len(targets)

    def ranking(self, name: str, count: int, stop: threading.Event) -> Iterator[str | list[Choice]]:
        """Names of candidates while their peaks are predicted, then the choices.

        Raises Cancelled once `stop` is set, and TargetError if nothing fits.
        """
        known = self._known.get((name, count))
        if known is None:
            for event in self._made(name, count, stop):
                yield event
                if not isinstance(event, str):
                    known = self._known[name, count] = event
        else:
            yield known

    def commands(self, name: str, count: int, choice: str | None) -> tuple[str, ...]:
        """The commands of a choice of a ranking that was made; none if there is no such choice."""
        found = self._known.get((name, count), [])
        return next((one.commands for one in found if one.name == choice), ())

    def _made(self, name: str, count: int, stop: threading.Event) -> Iterator[str | list[Choice]]:
        from bagel_compress.budgets.advise import advise

        events: queue.Queue[str | list[Choice] | BaseException] = queue.Queue()

        def on_candidate(candidate: str) -> None:
            if stop.is_set():
                raise Cancelled
            events.put(candidate)

        def work() -> None:
            try:
                events.put(advise([Target.load(name)] * count, builds=self.builds, on_candidate=on_candidate))
            except (BagelError, Cancelled, RuntimeError, MemoryError, OSError) as fault:
                events.put(fault)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while True:
                event = events.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if not isinstance(event, str):
                    return
        finally:
            stop.set()
            thread.join()


def machine_line(machine: Machine, t: Texts) -> str:
    """What was found here, as a sentence."""
    gpus = ", ".join(machine.gpus) or t("no_gpu")
    memory = "" if machine.memory is None else t("machine_memory", f"{machine.memory / 1e9:.0f}")
    return t("machine", gpus, f"{machine.disk / 1e9:.0f}") + memory


def ranking_table(choices: Sequence[Choice], machine: Machine, t: Texts) -> str:
    """The choices as a Markdown table, and the notes under it."""
    heads = ("recipe", "target", "error_drawing", "error_answers", "peak", "download_size", "disk", "build_time")
    lines = ["| " + " | ".join(t(head) for head in heads) + " |", "|---|---|" + "---:|" * 6]
    for c in choices:
        built = c.build_seconds == 0
        download = f"{c.download / 1e9:.1f} GB" if c.download else "–"
        disk = f"{c.disk / 1e9:.1f} GB" if c.disk else "–"
        seconds = c.build_seconds
        time = "–" if built else t("not_measured") if seconds is None else t("minutes", max(1, round(seconds / 60)))
        peak = f"{c.peak / GIB:.2f} / {c.limit / GIB:.2f} GiB"
        errors = f"{100 * c.errors.gen:.1f} % | {100 * c.errors.und:.1f} %"
        lines.append(f"| {c.name} | {c.target} | {errors} | {peak} | {download} | {disk} | {time} |")
    notes = [t("ranking_info")]
    if machine.disk < min((c.disk for c in choices), default=0):
        notes.append(t("disk_short", f"{machine.disk / 1e9:.1f}"))
    notes += [t("same_as", c.name, ", ".join(c.alike)) for c in choices if c.alike]
    return "\n".join([*lines, "", *(f"{note}  " for note in notes)])
