"""The page: its tabs, and which click starts what. One page for each language, at / and at /zh (or /en).

Runs wait in one queue, for there is one model to wait for; stopping does not wait. The widgets are `controls`', what
they start is `runs`', texts are `texts`', ranges and defaults `settings`'.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bagel_compress.app.advice import MOST_GPUS, Advisor, machine_line
from bagel_compress.app.controls import Controls
from bagel_compress.app.model_info import model_table
from bagel_compress.app.runs import Runs
from bagel_compress.app.session import OpenModel, Visit
from bagel_compress.app.texts import LANGUAGES, Texts
from bagel_compress.app.uploads import SUFFIXES
from bagel_compress.errors import MissingExtraError
from bagel_compress.run.picture_settings import read_settings
from bagel_compress.run.presets import presets_of


def build_page(models: Sequence[OpenModel], folder: Path, language: str = "en", advisor: Advisor | None = None) -> Any:
    """The page (gradio.Blocks) over these models, none to two; pictures are kept in `folder`.

    `advisor` ranks the builds of its first screen. Raises MissingExtraError.
    """
    try:
        import gradio as gr
    except ImportError:
        raise MissingExtraError("the page needs gradio; install bagel-compress[app].") from None

    first, *others = [language, *(other for other in LANGUAGES if other != language)]
    advisor = advisor or Advisor()
    visits: defaultdict[str, Visit] = defaultdict(Visit)

    def runs(language: str) -> Runs:
        return Runs(gr, Texts(language), models, folder, visits, advisor)

    with gr.Blocks(title=Texts(first)("title"), analytics_enabled=False) as page:
        gr.Navbar(main_page_name=LANGUAGES[first])
        _Page(gr, runs(first), "public").build()
    for other in others:
        with page.route(LANGUAGES[other], other):
            gr.Navbar(main_page_name=LANGUAGES[first])
            _Page(gr, runs(other), "private").build()
    page.queue(default_concurrency_limit=1, max_size=64)
    return page


class _Page:
    """The page in one language."""

    def __init__(self, gr: Any, runs: Runs, api: str) -> None:
        """`api`: whether its runs are named in the API, "public" or "private"."""
        self.gr, self.runs, self.t, self.models, self.api = gr, runs, runs.t, runs.models, api
        sizes = self.models[0].sizes if self.models else {}
        presets = presets_of(self.models[0].folder) if self.models else {}
        self.controls = Controls(gr, self.t, sizes, presets, runs.told)

    def build(self) -> None:
        gr, t = self.gr, self.t
        names = ", ".join(model.name for model in self.models)
        gr.Markdown(f"## {t('title')}\n{t('models', names) if names else t('no_model')}")
        self.visit = gr.State(None)
        with gr.Tabs():
            with gr.Tab(t("tab_advise")):
                self._advise_tab()
            if not self.models:
                return
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

    def _go(self, key: str) -> Any:
        """The button that starts a run; the one beside it stops it."""
        go, stop = self.controls.buttons(key)
        self._does(stop.click, self.runs.stop, self.visit, None)
        return go

    def _does(self, event: Any, call: Any, inputs: Any, outputs: Any, queue: bool = False) -> Any:
        """Something short happens at an event. Its progress is hidden: gradio lays it over the outputs and, when the
        call is refused, leaves it there, over controls that the visitor wants to click.
        """
        return event(call, inputs, outputs, queue=queue, show_progress="hidden", api_visibility="private")

    def _starts(
        self, button: Any, call: Any, inputs: list[Any], outputs: list[Any], status: Any, name: str, line: str = "model"
    ) -> None:
        """A button starts a run: first it says that the run waits, then the run tells the rest; a refused one says
        nothing more. `line`: its queue.
        """
        waiting = self._does(button.click, self.runs.arrive, self.visit, [self.visit, status])
        run = waiting.then(
            call, [self.visit, *inputs], outputs, concurrency_id=line, show_progress="hidden", api_name=name,
            api_visibility=self.api,
        )  # fmt: skip
        self._does(run.failure, lambda: "", None, status)

    def _advise_tab(self) -> None:
        gr, t, advisor = self.gr, self.t, self.runs.advisor
        gr.Markdown(f"{t('advise_lead')}  \n{machine_line(advisor.machine, t)}")
        name, count = advisor.found()
        with gr.Row():
            target = gr.Dropdown(
                advisor.targets(), value=name, label=t("target"), info=t.info("target"), min_width=230, scale=2
            )
            gpus = gr.Slider(1, MOST_GPUS, value=count, step=1, label=t("gpus"), min_width=200)
        go = self._go("advise")
        status = self.controls.status()
        table = gr.Markdown(elem_classes=["wide"])
        chosen = gr.Radio([], label=t("show_commands"), visible=False)
        commands = gr.Textbox(
            label=t("commands"), interactive=False, visible=False, lines=5, max_lines=20, buttons=["copy"],
            elem_classes=["typed"],
        )  # fmt: skip
        self._starts(
            go, self.runs.advise, [target, gpus], [table, chosen, commands, status], status, "advise", "advise"
        )
        self._does(chosen.change, self.runs.commands, [target, gpus, chosen], commands)

    def _draw_tab(self) -> None:
        gr, t = self.gr, self.t
        with gr.Row():
            with gr.Column(min_width=320):
                prompt, think = self.controls.prompt("prompt_draw"), self.controls.think()
                go = self._go("draw")
                controls = self.controls.settings("draw")
                load = self.controls.upload_button("load", [".png"])
            with gr.Column(min_width=320):
                outputs = self.controls.result()
                again = gr.Button(t("reuse"), size="sm")
        self.draw_controls = controls
        thoughts = outputs[1]
        self._does(think.change, lambda on: gr.update(visible=on), think, thoughts)
        self._does(again.click, lambda seed: seed or 0, outputs[3], controls[0])
        self._does(load.upload, self.runs.load, load, [prompt, think, outputs[2], *controls], queue=True)
        self._starts(go, self.runs.draw, [prompt, think, *controls], list(outputs), outputs[2], "draw")

    def _edit_tab(self) -> None:
        gr, t = self.gr, self.t
        with gr.Row():
            with gr.Column(min_width=320):
                picture = self.controls.upload()
                with gr.Row():
                    more = self.controls.upload_button("more", SUFFIXES, several=True)
                    chosen = gr.Markdown(t.info("more"))
                prompt, think = self.controls.prompt("prompt_edit"), self.controls.think()
                go = self._go("edit")
                controls = self.controls.settings("edit")
                gr.Markdown(t("edit_tip"))
            with gr.Column(min_width=320):
                outputs = self.controls.result()
                again = gr.Button(t("reuse"), size="sm")
        self._does(more.upload, lambda files: t("chosen", len(files or [])), more, chosen)
        self._does(think.change, lambda on: gr.update(visible=on), think, outputs[1])
        self._does(again.click, lambda seed: seed or 0, outputs[3], controls[0])
        self._starts(go, self.runs.edit, [picture, more, prompt, think, *controls], list(outputs), outputs[2], "edit")

    def _ask_tab(self) -> None:
        gr, t = self.gr, self.t
        with gr.Row():
            with gr.Column(min_width=320):
                picture = self.controls.upload()
                prompt, think = self.controls.prompt("prompt_ask"), self.controls.think()
                go = self._go("ask")
                controls = self.controls.settings("ask")
            with gr.Column(min_width=320):
                answer = gr.Textbox(label=t("answer"), lines=6, max_lines=20, interactive=False)
                status = self.controls.status()
        self._starts(go, self.runs.ask, [picture, prompt, think, *controls], [answer, status], status, "ask")

    def _compare_tab(self) -> None:
        gr, t = self.gr, self.t
        if len(self.models) < 2:
            gr.Markdown(t("second_missing"))
            return
        prompt = self.controls.prompt("prompt_draw")
        go = self._go("compare")
        controls = self.controls.settings("draw")
        status = self.controls.status()
        pictures = []
        with gr.Row():
            for label in [*(model.name for model in self.models[:2]), t("difference_label")]:
                with gr.Column(min_width=220):
                    gr.Markdown(f"**{label}**")
                    pictures.append(self.controls.picture())
        verdict = gr.Markdown()
        self._starts(go, self.runs.compare, [prompt, *controls], [*pictures, verdict, status], status, "compare")

    def _batch_tab(self) -> None:
        gr, t = self.gr, self.t
        gr.Markdown(t.info("batch"))
        prompts = gr.Textbox(label=t("prompts"), lines=6)
        file = self.controls.upload_button("prompts_file", [".txt"])
        go = self._go("batch")
        status = self.controls.status()
        gallery = self.controls.gallery("result")
        self._does(file.upload, self.runs.prompts_of, file, prompts)
        self._starts(go, self.runs.batch, [prompts, *self.draw_controls], [gallery, status], status, "batch")

    def _history_tab(self, tab: Any) -> None:
        gr, t = self.gr, self.t
        gr.Markdown(t.info("history"))
        gallery = self.controls.gallery("history")
        about = gr.JSON(label=t("settings_of"))
        self._does(tab.select, lambda visit: self.runs.visits[visit or ""].files[::-1], self.visit, gallery)

        def show(visit: str | None, event: Any) -> Any:
            return read_settings(self.runs.visits[visit or ""].files[::-1][event.index])

        show.__annotations__["event"] = gr.SelectData
        self._does(gallery.select, show, self.visit, about)
