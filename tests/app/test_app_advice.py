"""The first screen in a real browser: which build fits a GPU, and the commands to type; in both languages."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bagel_compress.budgets import advise as advising
from bagel_compress.budgets.predict import least_bytes
from bagel_compress.budgets.recommend import packaged_recipes, packaged_targets

SHOTS = os.environ.get("BAGEL_APP_SHOTS")
GIB = 2**30
LONG = 120_000  # milliseconds that a ranking may take on a small machine with other work


@pytest.fixture(scope="module")
def advice_page(launched: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A page without a model. Peaks are the least that a build holds and 3 GiB: the prediction is another test's."""
    pytest.importorskip("gradio", reason="the page needs the extra `app`")
    from bagel_compress.app.page import build_page

    def peak(build: Any, target: Any) -> Any:
        total = least_bytes(build.units, target, build.config.llm.num_layers) + 3 * GIB
        return SimpleNamespace(peak=total, broken=["too much"] if total > target.limit else [])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(advising, "predict", peak)
        with launched(build_page([], tmp_path_factory.mktemp("page"))) as url:
            yield url


def ranked(page: Any, target: str, key: str, done: str) -> None:
    page.get_by_label(key).first.click()
    page.get_by_role("option", name=re.compile(rf"^{target} ")).click()
    page.get_by_role("button", name=done, exact=True).click()
    page.locator("table").wait_for()
    page.locator(".typed textarea").wait_for()


def shot(page: Any, name: str) -> None:
    if SHOTS:
        page.wait_for_timeout(500)
        page.screenshot(path=Path(SHOTS) / f"{name}.png", full_page=True)


def test_builds_are_ranked_with_the_commands_to_type(advice_page: str, browser: Any) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900}, locale="zh-CN")  # Gradio's own words follow it
    page.set_default_timeout(LONG)
    page.goto(advice_page)
    ranked(page, "16gb", "GPU", "Rank the builds")
    heads = page.locator("th").all_inner_texts()
    assert [heads[0], heads[4], heads[-1]] == ["Recipe", "Peak memory", "Time to build"]
    names = page.locator("td:first-child").all_inner_texts()
    assert set(names) <= packaged_recipes().keys()
    assert len(names) == 6
    peaks = [float(text.split(" /")[0]) for text in page.locator("td:nth-child(5)").all_inner_texts()]
    assert max(peaks) <= packaged_targets()["16gb"].limit / GIB
    assert f"compress {names[0]} " in page.locator(".typed textarea").input_value()
    page.get_by_role("radio", name=names[2], exact=True).click()
    page.wait_for_function(f"document.querySelector('.typed textarea').value.includes('compress {names[2]} ')")
    shot(page, "advise")

    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    shot(page, "advise-phone")

    page.set_viewport_size({"width": 1280, "height": 900})
    page.get_by_text("中文", exact=True).click()
    ranked(page, "16gb", "显卡", "排列版本")
    words = set(re.findall(r"[A-Za-z][A-Za-z-]+", page.inner_text("body"))) - {
        "BAGEL",
        "GiB",
        "GB",
        "English",
        "resident",
    }
    known = " ".join([*packaged_recipes(), *packaged_targets(), *(t.device.name for t in packaged_targets().values())])
    assert [word for word in words if word not in known] == []
    shot(page, "advise-zh")
    page.close()


def test_the_ranking_as_an_api(advice_page: str) -> None:
    gradio_client = pytest.importorskip("gradio_client")
    client = gradio_client.Client(advice_page, verbose=False)
    with pytest.raises(Exception, match="Choose a GPU"):
        client.predict(None, 1, api_name="/advise")
    table, names, commands, said = client.predict("16gb", 1, api_name="/advise")
    assert table.count("\n| ") == len(names["choices"]) == 6
    assert "bagel-compress compress" in commands["value"]
    assert said == "6 builds fit"
    with pytest.raises(Exception, match="no packaged recipe and no given build fits"):
        client.predict("trt-rtx3060-12gb", 1, api_name="/advise")
