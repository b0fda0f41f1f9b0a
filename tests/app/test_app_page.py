"""The page in a real browser: drawing, thinking, editing, asking, comparing, stopping; both languages; on a phone."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

PROMPT = "a red circle left of a blue square on a white background"
NAMES = {
    "BAGEL",
    "BAGEL-nano",
    "nano",
    "int",
    "raw",
    "gb",
    "English",
    "GB",
    "GiB",
    "resident",
    "MB",
    "PNG",
    "cpu",
    "bf",
}  # not translated
SHOTS = os.environ.get("BAGEL_APP_SHOTS")  # a folder: screenshots to look at
LONG = 60_000


@pytest.fixture
def page(server: Any, browser: Any) -> Any:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(LONG)
    faults: list[str] = []
    page.on("pageerror", lambda fault: faults.append(str(fault)))
    page.goto(server.url)
    tab(page, "Text to image")
    page.get_by_label("Prompt").first.wait_for()
    yield page
    assert faults == []
    context.close()


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def press(page: Any, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).locator("visible=true").click()


def write(page: Any, text: str) -> None:
    page.locator("textarea:visible").first.fill(text)


def shot(page: Any, name: str) -> None:
    if SHOTS:
        page.wait_for_timeout(500)
        page.screenshot(path=Path(SHOTS) / f"{name}.png", full_page=True)


def fast(page: Any) -> None:
    """Settings opened, ten steps."""
    page.get_by_text("Settings", exact=True).locator("visible=true").click()
    page.get_by_label("number input for Steps").locator("visible=true").fill("10")


def drawn(page: Any) -> Any:
    """The picture that is shown."""
    return page.locator(".picture img:visible").first


def test_draw_think_stop_and_history(page: Any) -> None:
    write(page, PROMPT)
    fast(page)
    page.get_by_label("Seed").locator("visible=true").first.fill("7")
    press(page, "Draw")
    page.get_by_text("seed 7").wait_for()
    assert drawn(page).evaluate("image => image.naturalWidth") == 32
    assert drawn(page).bounding_box()["width"] > 400  # small pictures are shown large
    shot(page, "draw")

    page.get_by_label("Thinking").locator("visible=true").check()
    page.get_by_label("Thoughts").locator("visible=true").wait_for()
    write(page, "a red circle and a square")
    press(page, "Draw")
    page.wait_for_function("[...document.querySelectorAll('textarea')].some(t => t.value.includes('red circle '))")
    page.get_by_text("seed 7").wait_for()
    shot(page, "think")

    page.get_by_label("Thinking").locator("visible=true").uncheck()
    page.get_by_label("number input for Steps").locator("visible=true").fill("100")
    press(page, "Draw")
    page.get_by_text(re.compile(r"Step \d+ of 99")).wait_for()
    press(page, "Stop")
    page.get_by_text("Stopped").wait_for()

    tab(page, "History")
    page.locator(".grid-container img").first.wait_for()
    assert page.locator(".grid-container img").count() == 2
    page.locator(".grid-container button").first.click()
    page.get_by_text("timestep_shift").first.wait_for()
    shot(page, "history")


def test_edit_and_ask(page: Any, tmp_path: Path) -> None:
    picture = tmp_path / "scene.png"
    scene = Image.new("RGB", (32, 32), "white")
    scene.paste((220, 40, 40), (8, 8, 22, 22))
    scene.save(picture)
    tab(page, "Edit")
    page.locator("input[type=file]:not([disabled])").first.wait_for(state="attached")
    page.locator("[role=tabpanel]:visible input[type=file]").first.set_input_files(picture)
    page.locator(".upload img:visible").first.wait_for()
    page.wait_for_function("[...document.querySelectorAll('.upload img')].some(image => image.clientHeight > 100)")
    write(page, "make the background yellow")
    fast(page)
    press(page, "Edit")
    page.get_by_text(re.compile("Done in .* seed")).locator("visible=true").wait_for()
    shot(page, "edit")
    tab(page, "Understand")
    page.locator("[role=tabpanel]:visible input[type=file]").first.set_input_files(picture)
    page.locator(".upload img:visible").first.wait_for()
    write(page, "what color is the background ?")
    press(page, "Ask")
    page.get_by_text(re.compile(r"Done in .* tokens")).wait_for()
    assert page.get_by_label("Answer").input_value()
    shot(page, "ask")


def test_compare_two_builds(page: Any) -> None:
    tab(page, "Compare two builds")
    write(page, PROMPT)
    fast(page)
    press(page, "Draw with both")
    page.get_by_text(re.compile("PSNR|equal to the last pixel")).wait_for()
    assert page.locator(".picture img:visible").count() == 3
    shot(page, "compare")


def test_chinese_has_no_english_left(page: Any) -> None:
    page.get_by_text("中文", exact=True).click()
    page.get_by_role("button", name="排列版本").wait_for()
    seen = ""
    for name in ("我的显卡", "文生图", "图像编辑", "图像理解", "对比两个版本", "批量", "历史", "模型"):
        tab(page, name)
        opened = page.get_by_text("设置", exact=True).locator("visible=true")
        if opened.count():
            opened.first.click()
        page.wait_for_timeout(200)
        seen += page.inner_text("body")
        seen += " ".join(page.locator("textarea:visible").evaluate_all("all => all.map(one => one.placeholder)"))
        shot(page, f"zh-{name}")
    assert "若编辑结果模糊" in seen
    assert set(re.findall(r"[A-Za-z][A-Za-z-]+", seen)) <= NAMES


def test_a_phone_shows_everything_in_its_width(server: Any, browser: Any) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844})
    page = context.new_page()
    page.goto(server.url)
    page.get_by_role("button", name="Rank the builds").wait_for()
    shot(page, "phone-first")
    tab(page, "Text to image")
    write(page, PROMPT)
    fast(page)
    press(page, "Draw")
    page.get_by_text(re.compile("Done in")).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    shot(page, "phone")
    context.close()
