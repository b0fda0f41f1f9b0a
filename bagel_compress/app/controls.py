"""The widgets of the page in one language: their words from `texts`, their ranges and defaults from `settings`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from bagel_compress.app.refusals import check_range
from bagel_compress.app.settings import ADVANCED, SETTINGS, Setting
from bagel_compress.app.texts import Texts
from bagel_compress.app.uploads import read_picture

CSS = """
.picture .image-container, .picture .image-container > button, .picture .image-frame {width: 100%}
.picture .image-container img {width: 100%; height: auto; max-height: 75vh; object-fit: contain}
.upload .image-container, .upload .upload-container, .upload .image-frame {width: 100% !important}
.upload img {width: 100% !important; height: auto !important; max-height: 50vh !important; object-fit: contain}
.small img {image-rendering: pixelated}
.progress {min-height: 1.6em}
.toast-title {display: none !important}  /* Gradio's "Error": the sentence below it says what, in the page's language */
.typed textarea {font-family: ui-monospace, monospace; font-size: 85%}
.wide {overflow-x: auto}
.wide td, .wide th {padding: 4px 8px !important; white-space: nowrap; word-break: normal}
@media (max-width: 640px) {
  .picture .grid-container {grid-template-columns: 1fr 1fr}
  .tab-container button {padding-left: 8px; padding-right: 8px}
  .wide {font-size: 85%}
}
"""
SMALL = 128  # pixels: the pictures of a smaller model are shown enlarged, their pixels sharp


def theme() -> Any:
    """Colours; fonts of the system, so that the page fetches nothing from elsewhere."""
    import gradio as gr

    return gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


class Controls:
    """Makes widgets where gradio's current block is."""

    def __init__(
        self,
        gr: Any,
        t: Texts,
        sizes: Mapping[str, tuple[int, int]],
        presets: Iterable[str],
        told: Callable[..., Any],
    ) -> None:
        """`sizes`: ratio -> (width, height) of the model. `presets`: names of its build's.

        `told(call, *values)`: what the call returns, or gradio's Error with the sentence to show.
        """
        self.gr, self.t, self.sizes, self.presets, self._told = gr, t, sizes, presets, told
        self.look = ["picture", "small"] if max(map(max, sizes.values()), default=0) < SMALL else ["picture"]

    def prompt(self, key: str) -> Any:
        return self.gr.Textbox(label=self.t("prompt"), placeholder=self.t(key), lines=3, max_lines=8)

    def think(self) -> Any:
        return self.gr.Checkbox(label=self.t("thinking"), info=self.t.info("thinking"))

    def settings(self, tab: str) -> list[Any]:
        """The controls of a tab's settings, in their order."""
        with self.gr.Accordion(self.t("settings"), open=False), self.gr.Row():
            found = [self._setting(setting) for setting in SETTINGS[tab]]
        if ADVANCED[tab]:
            with self.gr.Accordion(self.t("advanced"), open=False):
                self.gr.Markdown(self.t.info("advanced"))
                with self.gr.Row():
                    found += [self._setting(setting) for setting in ADVANCED[tab]]
        return found

    def _setting(self, setting: Setting) -> Any:
        gr, label, info = self.gr, self.t(setting.name), self.t.info(setting.name)
        if setting.name == "ratio":
            shown = [(f"{ratio}  ({'{} x {}'.format(*self.sizes[ratio])})", ratio) for ratio in setting.choices]
            return gr.Dropdown(shown, value=setting.default, label=label, min_width=230)
        if setting.choices:
            choices = [*setting.choices, *(self.presets if setting.name == "preset" else ())]
            return gr.Radio([(self.t.choice(c), c) for c in choices], value=setting.default, label=label, info=info)
        if isinstance(setting.default, bool):
            with gr.Column(min_width=230):  # alone, a checkbox is squeezed to nothing
                return gr.Checkbox(value=setting.default, label=label, info=info)
        if setting.name == "seed":
            made = gr.Number(
                value=setting.default, minimum=setting.low, maximum=setting.high, precision=0, label=label, info=info,
                min_width=230,
            )  # fmt: skip
        else:
            made = gr.Slider(
                setting.low, setting.high, value=setting.default, step=setting.step, label=label, info=info,
                min_width=230,
            )  # fmt: skip
        return self._bounded(made, label, setting)

    def _bounded(self, made: Any, label: str, setting: Setting) -> Any:
        """The control, which says in the page's language that a number is out of its range."""
        rounded = made.preprocess

        def preprocess(payload: float | None) -> Any:
            self._told(check_range, label, payload, setting.low, setting.high)
            return rounded(payload)

        made.preprocess = preprocess
        return made

    def result(self) -> tuple[Any, Any, Any, Any]:
        """Picture, thoughts, progress, seed."""
        gr, t = self.gr, self.t
        picture = self.picture()
        status = self.status()
        thoughts = gr.Textbox(label=t("thoughts"), lines=2, max_lines=12, interactive=False, visible=False)
        seed = gr.Number(label=t("seed_used"), precision=0, visible=False)
        return picture, thoughts, status, seed

    def status(self) -> Any:
        """A line that says how far a run is."""
        return self.gr.Markdown(elem_classes=["progress"])

    def picture(self) -> Any:
        """A picture that was drawn; its file holds its settings."""
        return self.gr.Image(
            label=self.t("result"), show_label=False, format="png", interactive=False, elem_classes=self.look,
            buttons=["download", "fullscreen"], min_width=230,
        )  # fmt: skip

    def gallery(self, key: str) -> Any:
        return self.gr.Gallery(
            label=self.t(key), columns=4, interactive=False, format="png", elem_classes=self.look,
            buttons=["download_all"], show_label=False,
        )  # fmt: skip

    def buttons(self, key: str) -> tuple[Any, Any]:
        """The button that starts a run; the one beside it that stops it."""
        with self.gr.Row():
            go = self.gr.Button(self.t(key), variant="primary", min_width=120)
            stop = self.gr.Button(self.t("cancel"), min_width=80, scale=0)
        return go, stop

    def upload(self) -> Any:
        """A place for a picture of the visitor's; the run gets a PIL picture."""
        upload = self.gr.Image(
            label=self.t("input"), sources=["upload"], type="pil", placeholder=self.t("drop"),
            elem_classes=["upload", *self.look[1:]],
        )  # fmt: skip
        # Instead of gradio's own reader, which decodes before anything asks how large a picture is.
        upload.preprocess = lambda payload: None if payload is None else self._told(read_picture, payload.path)
        return upload

    def upload_button(self, key: str, suffixes: list[str], several: bool = False) -> Any:
        """A button that sends files; what is called gets their paths. Their content is the called one's to check."""
        count = "multiple" if several else "single"
        button = self.gr.UploadButton(self.t(key), file_count=count, file_types=suffixes, size="sm")
        button.preprocess = _paths if several else lambda payload: next(iter(_paths(payload)), None)
        return button


def _paths(payload: Any) -> list[str]:
    """Of what gradio received: nothing, a file, or a list of files."""
    if payload is None:
        return []
    return [payload.path] if hasattr(payload, "path") else [file.path for file in payload]
