"""The page: its controls, and what they start. One page for each language, at / and at /zh (or /en).

Runs wait in one queue, for there is one model to wait for; stopping does not wait. Texts are `texts`', ranges and
defaults `settings`'.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bagel.errors import BagelError, Cancelled
from bagel_compress.app.model_info import model_table
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
from bagel_compress.app.settings import SETTINGS, Setting, flow_of, text_of
from bagel_compress.app.texts import LANGUAGES, Texts
from bagel_compress.app.uploads import SUFFIXES, read_picture, read_prompts
from bagel_compress.errors import MissingExtraError
from bagel_compress.run.picture_settings import picture_settings, png_info, read_settings

CSS = """
.picture .image-container, .picture .image-container > button, .picture .image-frame {width: 100%}
.picture .image-container img {width: 100%; height: auto; max-height: 75vh; object-fit: contain}
.upload .image-container, .upload .upload-container, .upload .image-frame {width: 100% !important}
.upload img {width: 100% !important; height: auto !important; max-height: 50vh !important; object-fit: contain}
.small img {image-rendering: pixelated}
.progress {min-height: 1.6em}
@media (max-width: 640px) {.picture .grid-container {grid-template-columns: 1fr 1fr}}
"""
MARK = re.compile(r"<([1-9])>")


def build_page(models: Sequence[OpenModel], folder: Path, language: str = "en") -> Any:
    """The page (gradio.Blocks) over these models; pictures are kept in `folder`. Raises MissingExtraError."""
    try:
        import gradio as gr
    except ImportError:
        raise MissingExtraError("the page needs gradio; install bagel-compress[app].") from None

    first, *others = [language, *(other for other in LANGUAGES if other != language)]
    visits: defaultdict[str, Visit] = defaultdict(Visit)
    with gr.Blocks(title=Texts(first)("title"), analytics_enabled=False) as page:
        gr.Navbar(main_page_name=LANGUAGES[first])
        _Page(gr, models, folder, visits, first, "public").build()
    for other in others:
        with page.route(LANGUAGES[other], other):
            gr.Navbar(main_page_name=LANGUAGES[first])
            _Page(gr, models, folder, visits, other, "private").build()
    page.queue(default_concurrency_limit=1, max_size=64)
    return page


def theme() -> Any:
    """Colours; fonts of the system, so that the page fetches nothing from elsewhere."""
    import gradio as gr

    return gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def _checked(gr: Any, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except BagelError as fault:
        raise gr.Error(str(fault), print_exception=False) from None


class _Page:
    """The page in one language."""

    def __init__(
        self, gr: Any, models: Sequence[OpenModel], folder: Path, visits: dict[str, Visit], language: str, api: str
    ) -> None:
        self.gr, self.models, self.folder, self.visits, self.api = gr, models, folder, visits, api
        self.t = Texts(language)
        sides = max(max(size) for size in models[0].sizes.values())
        self.look = ["picture", "small"] if sides < 128 else ["picture"]

    # --- the controls -------------------------------------------------------------------------------------------------

    def build(self) -> None:
        gr, t = self.gr, self.t
        gr.Markdown(f"## {t('title')}\n{t('models', ', '.join(model.name for model in self.models))}")
        self.visit = gr.State(None)
        with gr.Tabs():
            with gr.Tab(t("tab_draw")):
                self._draw_tab()
            with gr.Tab(t("tab_edit")):
                self._edit_tab()
            with gr.Tab(t("tab_ask")):
                self._ask_tab()
            with gr.Tab(t("tab_compare")):
                self._compare_tab()
            with gr.Tab(t("tab_batch")):
                self._batch_tab()
            with gr.Tab(t("tab_history")) as tab:
                self._history_tab(tab)
            with gr.Tab(t("tab_model")):
                for model in self.models:
                    gr.Markdown(model_table(model, t))

    def _prompt(self, key: str) -> Any:
        return self.gr.Textbox(label=self.t("prompt"), placeholder=self.t(key), lines=3, max_lines=8)

    def _think(self) -> Any:
        return self.gr.Checkbox(label=self.t("thinking"), info=self.t.info("thinking"))

    def _settings(self, tab: str) -> list[Any]:
        with self.gr.Accordion(self.t("settings"), open=False), self.gr.Row():
            return [self._control(setting) for setting in SETTINGS[tab]]

    def _control(self, setting: Setting) -> Any:
        gr, label, info = self.gr, self.t(setting.name), self.t.info(setting.name)
        if setting.name == "ratio":
            sizes = self.models[0].sizes
            shown = [(f"{ratio}  ({sizes[ratio][0]} x {sizes[ratio][1]})", ratio) for ratio in setting.choices]
            return gr.Dropdown(shown, value=setting.default, label=label, min_width=230)
        if setting.choices:
            return gr.Radio(
                [(self.t.choice(c), c) for c in setting.choices], value=setting.default, label=label, info=info
            )
        if isinstance(setting.default, bool):
            with gr.Column(min_width=230):  # alone, a checkbox is squeezed to nothing
                return gr.Checkbox(value=setting.default, label=label, info=info)
        if setting.name == "seed":
            return gr.Number(
                value=setting.default, minimum=setting.low, maximum=setting.high, precision=0, label=label, info=info,
                min_width=230,
            )  # fmt: skip
        return gr.Slider(
            setting.low, setting.high, value=setting.default, step=setting.step, label=label, info=info, min_width=230
        )

    def _result(self) -> tuple[Any, Any, Any, Any]:
        """Picture, thoughts, progress, seed."""
        gr, t = self.gr, self.t
        picture = self._shown()
        status = gr.Markdown(elem_classes=["progress"])
        thoughts = gr.Textbox(label=t("thoughts"), lines=2, max_lines=12, interactive=False, visible=False)
        seed = gr.Number(label=t("seed_used"), precision=0, visible=False)
        return picture, thoughts, status, seed

    def _shown(self) -> Any:
        """A picture that was drawn; its file holds its settings."""
        return self.gr.Image(
            label=self.t("result"), show_label=False, format="png", interactive=False, elem_classes=self.look,
            buttons=["download", "fullscreen"], min_width=230,
        )  # fmt: skip

    def _gallery(self, key: str) -> Any:
        return self.gr.Gallery(
            label=self.t(key), columns=4, interactive=False, format="png", elem_classes=self.look,
            buttons=["download_all"], show_label=False,
        )  # fmt: skip

    def _buttons(self, key: str) -> Any:
        """The button that starts a run; the one beside it stops it."""
        with self.gr.Row():
            go = self.gr.Button(self.t(key), variant="primary", min_width=120)
            stop = self.gr.Button(self.t("cancel"), min_width=80, scale=0)
        stop.click(self._stop, self.visit, None, queue=False, api_visibility="private")
        return go

    def _starts(self, button: Any, call: Any, inputs: list[Any], outputs: list[Any], status: Any, name: str) -> None:
        """A button starts a run: first it says that the run waits, then the run tells the rest."""
        waiting = button.click(
            self._arrive,
            self.visit,
            [self.visit, status],
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )
        waiting.then(
            call, [self.visit, *inputs], outputs, concurrency_id="model", show_progress="hidden", api_name=name,
            api_visibility=self.api,
        )  # fmt: skip

    def _draw_tab(self) -> None:
        gr, t = self.gr, self.t
        with gr.Row():
            with gr.Column(min_width=320):
                prompt, think = self._prompt("prompt_draw"), self._think()
                go = self._buttons("draw")
                controls = self._settings("draw")
                load = gr.UploadButton(t("load"), file_types=[".png"], size="sm")
            with gr.Column(min_width=320):
                outputs = self._result()
                again = gr.Button(t("reuse"), size="sm")
        self.draw_controls = controls
        thoughts = outputs[1]
        think.change(lambda on: gr.update(visible=on), think, thoughts, queue=False, api_visibility="private")
        again.click(lambda seed: seed or 0, outputs[3], controls[0], queue=False, api_visibility="private")
        load.upload(self._load, load, [prompt, think, outputs[2], *controls], queue=False, api_visibility="private")
        self._starts(go, self.draw, [prompt, think, *controls], list(outputs), outputs[2], "draw")

    def _edit_tab(self) -> None:
        gr, t = self.gr, self.t
        with gr.Row():
            with gr.Column(min_width=320):
                picture = self._upload()
                with gr.Row():
                    more = gr.UploadButton(t("more"), file_count="multiple", file_types=SUFFIXES, size="sm")
                    chosen = gr.Markdown(t.info("more"))
                prompt, think = self._prompt("prompt_edit"), self._think()
                go = self._buttons("edit")
                controls = self._settings("edit")
                gr.Markdown(t("edit_tip"))
            with gr.Column(min_width=320):
                outputs = self._result()
                again = gr.Button(t("reuse"), size="sm")
        more.upload(lambda files: t("chosen", len(files or [])), more, chosen, queue=False, api_visibility="private")
        think.change(lambda on: gr.update(visible=on), think, outputs[1], queue=False, api_visibility="private")
        again.click(lambda seed: seed or 0, outputs[3], controls[0], queue=False, api_visibility="private")
        self._starts(go, self.edit, [picture, more, prompt, think, *controls], list(outputs), outputs[2], "edit")

    def _upload(self) -> Any:
        upload = self.gr.Image(
            label=self.t("input"),
            sources=["upload"],
            type="pil",
            placeholder=self.t("drop"),
            elem_classes=["upload", *self.look[1:]],
        )
        # Instead of gradio's own reader, which decodes before anything asks how large a picture is.
        upload.preprocess = self._read
        return upload

    def _read(self, payload: Any) -> Image.Image | None:
        return None if payload is None else _checked(self.gr, lambda: read_picture(payload.path))

    def _ask_tab(self) -> None:
        gr, t = self.gr, self.t
        with gr.Row():
            with gr.Column(min_width=320):
                picture = self._upload()
                prompt, think = self._prompt("prompt_ask"), self._think()
                go = self._buttons("ask")
                controls = self._settings("ask")
            with gr.Column(min_width=320):
                answer = gr.Textbox(label=t("answer"), lines=6, max_lines=20, interactive=False)
                status = gr.Markdown(elem_classes=["progress"])
        self._starts(go, self.ask, [picture, prompt, think, *controls], [answer, status], status, "ask")

    def _compare_tab(self) -> None:
        gr, t = self.gr, self.t
        if len(self.models) < 2:
            gr.Markdown(t("second_missing"))
            return
        prompt = self._prompt("prompt_draw")
        go = self._buttons("compare")
        controls = self._settings("draw")
        status = gr.Markdown(elem_classes=["progress"])
        pictures = []
        with gr.Row():
            for label in [*(model.name for model in self.models[:2]), t("difference_label")]:
                with gr.Column(min_width=220):
                    gr.Markdown(f"**{label}**")
                    pictures.append(self._shown())
        verdict = gr.Markdown()
        self._starts(go, self.compare, [prompt, *controls], [*pictures, verdict, status], status, "compare")

    def _batch_tab(self) -> None:
        gr, t = self.gr, self.t
        gr.Markdown(t.info("batch"))
        prompts = gr.Textbox(label=t("prompts"), lines=6)
        file = gr.UploadButton(t("prompts_file"), file_types=[".txt"], size="sm")
        go = self._buttons("batch")
        status = gr.Markdown(elem_classes=["progress"])
        gallery = self._gallery("result")
        file.upload(self._prompts_of, file, prompts, queue=False, api_visibility="private")
        self._starts(go, self.batch, [prompts, *self.draw_controls], [gallery, status], status, "batch")

    def _history_tab(self, tab: Any) -> None:
        gr, t = self.gr, self.t
        gr.Markdown(t.info("history"))
        gallery = self._gallery("history")
        about = gr.JSON(label=t("settings_of"))
        tab.select(
            lambda visit: self.visits[visit or ""].files[::-1],
            self.visit,
            gallery,
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )

        def show(visit: str | None, event: Any) -> Any:
            return read_settings(self.visits[visit or ""].files[::-1][event.index])

        show.__annotations__["event"] = gr.SelectData
        gallery.select(show, self.visit, about, queue=False, api_visibility="private")

    # --- what they start ----------------------------------------------------------------------------------------------

    def _arrive(self, visit: str | None) -> tuple[str, str]:
        import secrets

        return visit or secrets.token_hex(8), self.t("waiting")

    def _stop(self, visit: str | None) -> None:
        self.visits[visit or ""].stop.set()

    def _load(self, path: str) -> list[Any]:
        """Controls from the settings of a picture; unknown values stay as they are."""
        gr = self.gr
        found = _checked(gr, lambda: read_settings(path))
        flow = found.get("flow") or {}
        thinking = found.get("thinking") or {}
        known: dict[str, Any] = {**flow, **thinking, "seed": found.get("seed")}
        known["cfg_interval_start"] = (flow.get("cfg_interval") or [None])[0]
        sizes = {size: ratio for ratio, size in self.models[0].sizes.items()}
        known["ratio"] = sizes.get((found.get("width"), found.get("height")))
        values = [
            gr.update() if known.get(s.name) is None else gr.update(value=known[s.name]) for s in SETTINGS["draw"]
        ]
        return [str(found.get("prompt", "")), bool(thinking), "", *values]

    def _prompts_of(self, path: str) -> str:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
        return "\n".join(_checked(self.gr, lambda: read_prompts(text)))

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
        others = [_checked(self.gr, partial(read_picture, path)) for path in more or []]
        pictures = [*([picture] if picture is not None else []), *others]
        if not pictures:
            raise self._error(self.t("drop"))
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
        flow, text = self._valid(values)
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
        except (BagelError, RuntimeError, MemoryError, OSError) as fault:
            raise self._error(str(fault)) from None

    def ask(
        self, visit: str | None, picture: Image.Image | None, prompt: str, think: bool, *values: Any
    ) -> Iterator[tuple[Any, ...]]:
        t = self.t
        turns = [prompt] if picture is None else turns_of(prompt, [picture])
        yield "", t("reading")
        text = _checked(self.gr, lambda: text_of(_named("ask", values)))
        try:
            for event in run(self.models[0], turns, self._fresh(visit), output="text", think=think, text=text):
                if isinstance(event, TextSoFar):
                    yield event.text, t("thinking_now", event.tokens) if think else t("reading")
                elif isinstance(event, Finished):
                    tokens = len(event.result.ids) - 1
                    yield event.result.text or "", t("answered", f"{event.seconds:.1f}", tokens)
        except Cancelled:
            yield self.gr.update(), t("cancelled")
        except (BagelError, RuntimeError, MemoryError, OSError) as fault:
            raise self._error(str(fault)) from None

    def compare(self, visit: str | None, prompt: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Two builds from the same noise, and how they differ."""
        gr, t = self.gr, self.t
        named = _named("draw", values)
        seed, stop = chosen_seed(named["seed"]), self._fresh(visit)
        shown: list[Any] = [None, None, None]
        flow, text = self._valid(named)
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
        except (BagelError, RuntimeError, MemoryError, OSError) as fault:
            raise self._error(str(fault)) from None
        apart, gain, largest = difference(*drawn)
        shown[2] = apart
        verdict = t("equal") if not largest else t("psnr", f"{psnr(*drawn):.2f}", largest, gain)
        yield *shown, verdict, t("done", f"{time.perf_counter() - begun:.1f}", seed)

    def batch(self, visit: str | None, prompts: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """One picture for each line, with seeds that follow each other."""
        gr, t, model = self.gr, self.t, self.models[0]
        named = _named("draw", values)
        lines = _checked(gr, lambda: read_prompts(prompts))
        seed, stop, files = chosen_seed(named["seed"]), self._fresh(visit), []
        flow, text = self._valid(named)
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
        except (BagelError, RuntimeError, MemoryError, OSError) as fault:
            raise self._error(str(fault)) from None
        yield list(files), t("batch_done", len(files), f"{time.perf_counter() - begun:.1f}")

    # --- parts of them ------------------------------------------------------------------------------------------------

    def _error(self, sentence: str) -> Exception:
        fault: Exception = self.gr.Error(sentence, title=self.t("error"), print_exception=False)
        return fault

    def _valid(self, values: Mapping[str, Any]) -> tuple[Any, Any]:
        try:
            return flow_of(values), text_of(values)
        except BagelError as fault:
            raise self._error(str(fault)) from None

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
    return {setting.name: value for setting, value in zip(SETTINGS[tab], values, strict=True)}


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
