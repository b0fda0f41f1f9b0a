"""The page in a real browser: drawing, thinking, editing, asking, comparing, stopping; both languages; on a phone."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bagel.settings import FlowSettings
from bagel_compress.run.picture_settings import picture_settings, png_info

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
    "euler",
    "ab",
    "heun",
    "dpm",
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


def opened(page: Any, name: str) -> None:
    """An accordion opened, its controls at rest: Gradio sets their first values only after they are drawn."""
    page.get_by_text(name, exact=True).locator("visible=true").click()
    page.wait_for_timeout(500)


def fast(page: Any) -> None:
    """Settings opened, ten steps."""
    opened(page, "Settings")
    page.get_by_label("number input for Steps").locator("visible=true").fill("10")


def drawn(page: Any) -> Any:
    """The picture that is shown."""
    return page.locator(".picture img:visible").first


def test_draw_think_and_history(page: Any) -> None:
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
    page.wait_for_function("[...document.querySelectorAll('textarea')].some(t => t.value.includes('background'))")
    page.get_by_text("seed 7").wait_for()
    shot(page, "think")

    tab(page, "History")
    page.locator(".grid-container img").first.wait_for()
    assert page.locator(".grid-container img").count() == 2
    page.locator(".grid-container button").first.click()
    page.get_by_text("timestep_shift").first.wait_for()
    shot(page, "history")


def test_prompts_of_a_file_are_drawn_until_stop(page: Any, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(["a red circle", "", *["a blue square"] * 150]))
    fast(page)
    tab(page, "Batch")
    page.locator("[role=tabpanel]:visible input[type=file]").set_input_files(file)
    page.wait_for_function(
        "[...document.querySelectorAll('textarea')].some(t => t.value.startsWith('a red circle\\na'))"
    )
    press(page, "Draw all")
    page.locator(".grid-container img:visible").first.wait_for()
    shot(page, "batch")
    press(page, "Stop")  # 151 pictures take longer than a click
    page.get_by_text("Stopped").locator("visible=true").wait_for()


def test_settings_come_back_from_a_picture(page: Any, tmp_path: Path) -> None:
    flow = FlowSettings(num_timesteps=12, timestep_shift=2.5, cfg_interval=(0.2, 1.0), solver="ab2", cache_every=3)
    held = picture_settings("nf4", "a green triangle", 4321, (32, 24), flow, None)
    Image.new("RGB", (32, 24)).save(tmp_path / "a.png", pnginfo=png_info(held))
    page.locator("[role=tabpanel]:visible input[type=file]").set_input_files(tmp_path / "a.png")
    page.wait_for_function("document.querySelector('textarea').value == 'a green triangle'")
    opened(page, "Settings")
    opened(page, "Advanced")
    for name, value in (("Steps", "12"), ("Timestep shift", "2.5"), ("Guidance from", "0.2")):
        assert page.get_by_label(f"number input for {name}").locator("visible=true").input_value() == value
    assert page.get_by_label("Seed").locator("visible=true").first.input_value() == "4321"
    assert page.get_by_label("number input for Evaluate every k-th step").input_value() == "3"
    assert page.get_by_role("radio", name="ab2").locator("visible=true").is_checked()
    shot(page, "advanced")
    press(page, "Draw")
    page.get_by_text("seed 4321").wait_for()
    size = "image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])"
    assert drawn(page).evaluate(size) == [32, 24]


def test_an_edit_of_several_pictures(page: Any, tmp_path: Path) -> None:
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "green")):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{name}.png")
    tab(page, "Edit")
    inputs = page.locator("[role=tabpanel]:visible input[type=file]")
    page.locator(".upload:visible").first.wait_for()
    inputs.first.set_input_files(tmp_path / "a.png")
    inputs.last.set_input_files([tmp_path / "b.png", tmp_path / "c.png"])
    page.get_by_text("2 further pictures").wait_for()
    page.locator(".upload img:visible").first.wait_for()
    write(page, "put <2> beside <1> and <3>")
    fast(page)
    press(page, "Edit")
    page.get_by_text(re.compile("Done in .* seed")).locator("visible=true").wait_for()
    shot(page, "edit-several")


def test_errors_are_in_the_page_s_language(server: Any, browser: Any, tmp_path: Path) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900}, locale="zh-CN")
    page.goto(f"{server.url}zh")
    html, plain = tmp_path / "b.png", tmp_path / "c.png"
    html.write_text("<html></html>")
    Image.new("RGB", (8, 8)).save(plain)

    def told(sentence: str) -> None:
        toast = page.locator(".toast-body").filter(has_text=sentence)
        toast.wait_for()
        text = toast.inner_text()
        quoted = text.partition("（英文原文）")[0]  # the toolkit's own words stand behind this lead
        assert set(re.findall(r"[A-Za-z]+", quoted)) <= {"PNG", "JPEG", "WebP"}, text
        shot(page, f"zh-error-{sentence[:4]}")
        toast.get_by_test_id("toast-close").click()

    page.get_by_role("button", name="排列版本").click()
    told("请选择显卡")
    tab(page, "文生图")
    page.locator("[role=tabpanel]:visible input[type=file]").set_input_files(plain)
    told("此图片不含设置")
    opened(page, "设置")
    page.get_by_label("随机种子").locator("visible=true").first.fill("2000000")
    press(page, "绘图")
    told("“随机种子”为 2000000")
    page.get_by_label("随机种子").locator("visible=true").first.fill("7")
    opened(page, "高级")
    page.get_by_role("radio", name="heun").locator("visible=true").check()
    page.get_by_label("number input for 每隔几步计算一次").locator("visible=true").fill("2")
    press(page, "绘图")
    told("程序报告（英文原文）")
    page.wait_for_function("[...document.querySelectorAll('.progress')].every(line => line.innerText.trim() == '')")
    tab(page, "图像编辑")
    press(page, "编辑")
    told("还没有图片")
    page.locator("[role=tabpanel]:visible input[type=file]").last.set_input_files(html)
    page.get_by_text("另有 1 张图片").wait_for()
    press(page, "编辑")
    told("该文件不是可读取的图片")
    tab(page, "批量")
    press(page, "全部绘制")
    told("共有 0 条提示词")
    page.close()


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
        for closed in ("设置", "高级"):
            opened = page.get_by_text(closed, exact=True).locator("visible=true")
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
