"""What a click starts: draw, edit, ask, compare, batch, and what they share. Each is a generator that gradio follows.

Texts are in one language; pictures are kept in a folder, with their settings, for the visitor's history.
"""

from __future__ import annotations

import re
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bagel.errors import BagelError, Cancelled
from bagel.settings import FlowSettings
from bagel_compress.app.advice import Advisor, ranking_table
from bagel_compress.app.refusals import RefusedError, sentence
from bagel_compress.app.session import (
    Finished,
    OpenModel,
    StepMade,
    TextSoFar,
    Visit,
    chosen_seed,
    difference,
    run,
)
from bagel_compress.app.settings import NO_PRESET, flow_of, settings_of, text_of
from bagel_compress.app.texts import Texts
from bagel_compress.app.uploads import read_picture, read_prompts
from bagel_compress.errors import InputError
from bagel_compress.run.picture_settings import picture_settings, png_info, read_settings
from bagel_compress.run.presets import with_preset

MARK = re.compile(r"<([1-9])>")
FAULTS = (BagelError, RuntimeError, MemoryError, OSError)  # of a run, told to the visitor


class Runs:
    """What clicks start, for the page in one language."""

    def __init__(
        self,
        gr: Any,
        t: Texts,
        models: Sequence[OpenModel],
        folder: Path,
        visits: defaultdict[str, Visit],
        advisor: Advisor,
    ) -> None:
        self.gr, self.t, self.models, self.folder = gr, t, models, folder
        self.visits, self.advisor = visits, advisor

    def arrive(self, visit: str | None) -> tuple[str, str]:
        return visit or secrets.token_hex(8), self.t("waiting")

    def stop(self, visit: str | None) -> None:
        self.visits[visit or ""].stop.set()

    def load(self, path: str) -> list[Any]:
        """Controls from the settings of a picture; unknown values stay as they are."""
        gr = self.gr
        try:
            found: dict[str, Any] = read_settings(path)
        except InputError:
            raise self._error(RefusedError("no_settings")) from None
        flow = found.get("flow") or {}
        thinking = found.get("thinking") or {}
        known: dict[str, Any] = {**flow, **thinking, "seed": found.get("seed")}
        known["cfg_interval_start"] = (flow.get("cfg_interval") or [None])[0]
        sizes: dict[Any, str] = {size: ratio for ratio, size in self.models[0].sizes.items()}
        known["preset"] = NO_PRESET  # what it gave is among the settings
        known["ratio"] = sizes.get((found.get("width"), found.get("height")))
        values = [
            gr.update() if known.get(s.name) is None else gr.update(value=known[s.name]) for s in settings_of("draw")
        ]
        return [str(found.get("prompt", "")), bool(thinking), "", *values]

    def prompts_of(self, path: str) -> str:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
        return "\n".join(self.told(read_prompts, text))

    def advise(self, visit: str | None, target: str | None, gpus: float) -> Iterator[tuple[Any, ...]]:
        """Table, names to choose from, commands and progress of a ranking."""
        gr, t = self.gr, self.t
        if target is None:
            raise self._error(RefusedError("advise_first"))
        same = gr.update()
        try:
            for event in self.advisor.ranking(target, int(gpus), self._fresh(visit)):
                if isinstance(event, str):
                    yield same, same, same, t("predicting", event)
                    continue
                table = ranking_table(event, self.advisor.machine, t)
                names = gr.update(choices=[choice.name for choice in event], value=event[0].name, visible=True)
                commands = gr.update(value="\n".join(event[0].commands), visible=True)
                yield table, names, commands, t("ranked", len(event))
        except Cancelled:
            yield same, same, same, t("cancelled")
        except FAULTS as fault:
            raise self._error(fault) from None

    def commands(self, target: str, gpus: float, name: str | None) -> str:
        """The commands of a row of a ranking that was made."""
        return "\n".join(self.advisor.commands(target, int(gpus), name))

    def draw(self, visit: str | None, prompt: str, think: bool, *values: Any) -> Iterator[tuple[Any, ...]]:
        yield from self._drawn(visit, [prompt], prompt, think, _named("draw", values))

    def edit(
        self,
        visit: str | None,
        picture: Image.Image | None,
        more: list[str] | None,
        prompt: str,
        think: bool,
        *values: Any,
    ) -> Iterator[tuple[Any, ...]]:
        others = [self.told(read_picture, path) for path in more or []]
        pictures = [*([picture] if picture is not None else []), *others]
        if not pictures:
            raise self._error(RefusedError("picture_missing"))
        yield from self._drawn(visit, turns_of(prompt, pictures), prompt, think, _named("edit", values))

    def _drawn(
        self, visit: str | None, turns: list[Any], prompt: str, think: bool, values: Mapping[str, Any]
    ) -> Iterator[tuple[Any, ...]]:
        """Picture, thoughts, progress and seed while a picture is drawn."""
        gr, t, seed = self.gr, self.t, chosen_seed(values["seed"])
        picture: Any = gr.update()
        words: Any = gr.update(value="", visible=think)
        model = self.models[0]
        size = model.sizes[values["ratio"]] if "ratio" in values else None
        yield picture, words, t("reading"), seed
        flow, text = self._flow(values), self.told(text_of, values)
        try:
            for event in run(model, turns, self._fresh(visit), think=think, size=size, flow=flow, text=text, seed=seed):
                if isinstance(event, TextSoFar):
                    words = event.text
                    yield gr.update(), words, t("thinking_now", event.tokens), seed
                elif isinstance(event, StepMade):
                    shown = gr.update() if event.preview is None else event.preview
                    yield shown, gr.update(), t("step", event.index, event.count), seed
                else:
                    file = self._kept(visit, model, prompt, seed, event, flow, text if think else None)
                    thoughts = event.result.text or ""
                    yield file, thoughts if think else gr.update(), t("done", f"{event.seconds:.1f}", seed), seed
        except Cancelled:
            yield gr.update(), gr.update(), t("cancelled"), seed
        except FAULTS as fault:
            raise self._error(fault) from None

    def ask(
        self, visit: str | None, picture: Image.Image | None, prompt: str, think: bool, *values: Any
    ) -> Iterator[tuple[Any, ...]]:
        t = self.t
        turns = [prompt] if picture is None else turns_of(prompt, [picture])
        yield "", t("reading")
        text = self.told(text_of, _named("ask", values))
        try:
            for event in run(self.models[0], turns, self._fresh(visit), output="text", think=think, text=text):
                if isinstance(event, TextSoFar):
                    yield event.text, t("thinking_now", event.tokens) if think else t("reading")
                elif isinstance(event, Finished):
                    tokens = len(event.result.ids) - 1
                    yield event.result.text or "", t("answered", f"{event.seconds:.1f}", tokens)
        except Cancelled:
            yield self.gr.update(), t("cancelled")
        except FAULTS as fault:
            raise self._error(fault) from None

    def compare(self, visit: str | None, prompt: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Two builds from the same noise, and how they differ."""
        gr, t = self.gr, self.t
        named = _named("draw", values)
        seed, stop = chosen_seed(named["seed"]), self._fresh(visit)
        shown: list[Any] = [None, None, None]
        flow, text = self._flow(named), self.told(text_of, named)
        drawn: list[Image.Image] = []
        begun = time.perf_counter()
        try:
            for place, model in enumerate(self.models[:2]):
                size = self.models[0].sizes[named["ratio"]]
                for event in run(model, [prompt], stop, size=size, flow=flow, text=text, seed=seed):
                    if isinstance(event, StepMade):
                        shown[place] = gr.update() if event.preview is None else event.preview
                        yield *shown, "", f"{model.name}: {t('step', event.index, event.count)}"
                    elif isinstance(event, Finished) and event.result.image is not None:
                        drawn.append(event.result.image)
                        shown[place] = self._kept(visit, model, prompt, seed, event, flow, None)
                stop = self._fresh(visit)
        except Cancelled:
            yield *(gr.update() for _ in shown), "", t("cancelled")
            return
        except FAULTS as fault:
            raise self._error(fault) from None
        apart, gain, largest = difference(*drawn)
        shown[2] = apart
        verdict = t("equal") if not largest else t("psnr", f"{psnr(*drawn):.2f}", largest, gain)
        yield *shown, verdict, t("done", f"{time.perf_counter() - begun:.1f}", seed)

    def batch(self, visit: str | None, prompts: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """One picture for each line, with seeds that follow each other."""
        gr, t, model = self.gr, self.t, self.models[0]
        named = _named("draw", values)
        lines = self.told(read_prompts, prompts)
        seed, stop, files = chosen_seed(named["seed"]), self._fresh(visit), []
        flow, text = self._flow(named), self.told(text_of, named)
        size, begun = model.sizes[named["ratio"]], time.perf_counter()
        try:
            for index, line in enumerate(lines):
                for event in run(model, [line], stop, size=size, flow=flow, text=text, seed=seed + index):
                    if isinstance(event, StepMade):
                        yield gr.update(), t("batch_step", index + 1, len(lines), event.index, event.count)
                    elif isinstance(event, Finished):
                        files.append((self._kept(visit, model, line, seed + index, event, flow, None), line))
                stop = self._fresh(visit)
                yield list(files), gr.update()
        except Cancelled:
            yield list(files), t("cancelled")
            return
        except FAULTS as fault:
            raise self._error(fault) from None
        yield list(files), t("batch_done", len(files), f"{time.perf_counter() - begun:.1f}")

    def _error(self, fault: BaseException) -> Exception:
        """What gradio shows of a fault."""
        shown: Exception = self.gr.Error(sentence(fault, self.t), print_exception=False)
        return shown

    def _flow(self, values: Mapping[str, Any]) -> FlowSettings:
        """The sampler's settings, a preset of the first model's build on top."""
        flow: FlowSettings = self.told(flow_of, values)
        preset = values["preset"]
        return flow if preset == NO_PRESET else self.told(with_preset, flow, preset, self.models[0].folder)

    def told(self, call: Callable[..., Any], *values: Any) -> Any:
        """What a call returns; where it fails, gradio's Error with the sentence to show."""
        try:
            return call(*values)
        except FAULTS as fault:
            raise self._error(fault) from None

    def _fresh(self, visit: str | None) -> Any:
        """A stop of the visitor's that is not set."""
        stop = type(self.visits[visit or ""].stop)()
        self.visits[visit or ""].stop = stop
        return stop

    def _kept(
        self, visit: str | None, model: OpenModel, prompt: str, seed: int, done: Finished, flow: Any, thinking: Any
    ) -> str:
        """Writes the picture with its settings; the path."""
        image = done.result.image
        assert image is not None
        settings = picture_settings(model.name, prompt, seed, image.size, flow, thinking)
        files = self.visits[visit or ""].files
        file = self.folder / f"{re.sub('[^A-Za-z0-9]+', '-', model.name)[:40]}-{seed}-{time.time_ns()}.png"
        image.save(file, "PNG", pnginfo=png_info(settings))
        files.append(str(file))
        return str(file)


def _named(tab: str, values: Sequence[Any]) -> dict[str, Any]:
    return {setting.name: value for setting, value in zip(settings_of(tab), values, strict=True)}


def turns_of(prompt: str, pictures: Sequence[Image.Image]) -> list[str | Image.Image]:
    """Pictures first, then the prompt; <1> in the prompt is the place of the first picture instead."""
    places = [int(number) - 1 for number in MARK.findall(prompt)]
    if not places or max(places) >= len(pictures):
        return [*pictures, prompt]
    turns: list[str | Image.Image] = [picture for i, picture in enumerate(pictures) if i not in places]
    for index, part in enumerate(MARK.split(prompt)):
        if index % 2:
            turns.append(pictures[int(part) - 1])
        elif part.strip():
            turns.append(part.strip())
    return turns


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Of two pictures, dB."""
    import torch

    from bagel_compress.parity.metrics import psnr as measured

    return measured(*(torch.from_numpy(np.array(image)) for image in (a, b)))
