"""What the page is made of: the official settings, the texts, uploads, settings in pictures, who may visit."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bagel.errors import BagelError
from bagel.settings import FlowSettings
from bagel_compress.app.session import Finished, StepMade, difference, open_models, run, small_picture
from bagel_compress.app.settings import ADVANCED, RATIOS, SETTINGS, flow_of, settings_of, sizes_of, text_of
from bagel_compress.app.texts import LANGUAGES, TEXTS
from bagel_compress.app.uploads import read_picture, read_prompts
from bagel_compress.errors import InputError
from bagel_compress.run.picture_settings import picture_settings, png_info, read_settings

NANO = Path(__file__).parents[2] / "bagel_compress" / "data" / "BAGEL-nano"
# The official page: name, lowest, highest, default. `local` of its renorm types is `channel`.
OFFICIAL: dict[str, dict[str, tuple[Any, ...]]] = {
    "draw": {
        "seed": (0, 1_000_000, 0), "cfg_text_scale": (1, 8, 4.0), "cfg_interval_start": (0, 1, 0.4),
        "cfg_renorm_min": (0, 1, 0), "num_timesteps": (10, 100, 50), "timestep_shift": (1, 5, 3.0),
        "max_tokens": (64, 4096, 1024), "temperature": (0.1, 1, 0.3), "do_sample": (0, 0, False),
        "cfg_renorm_type": (0, 0, "global"), "ratio": (0, 0, "1:1"),
    },
    "edit": {
        "seed": (0, 1_000_000, 0), "cfg_text_scale": (1, 8, 4.0), "cfg_img_scale": (1, 4, 2.0),
        "cfg_interval_start": (0, 1, 0.0), "cfg_renorm_min": (0, 1, 0), "num_timesteps": (10, 100, 50),
        "timestep_shift": (1, 10, 3.0), "max_tokens": (64, 4096, 1024), "temperature": (0.1, 1, 0.3),
        "do_sample": (0, 0, False), "cfg_renorm_type": (0, 0, "text_channel"),
    },
    "ask": {"do_sample": (0, 0, False), "temperature": (0, 1, 0.3), "max_tokens": (64, 4096, 512)},
}  # fmt: skip


@pytest.mark.parametrize("tab", OFFICIAL)
def test_every_official_setting_has_its_range_and_default(tab: str) -> None:
    assert {s.name: (s.low, s.high, s.default) for s in SETTINGS[tab]} == OFFICIAL[tab]
    renorm = [s.choices for s in SETTINGS[tab] if s.name == "cfg_renorm_type"]
    assert renorm in ([], [("global", "channel", "text_channel")])


def test_official_ratios_and_a_small_model_s() -> None:
    assert sizes_of(1024, 16) == RATIOS
    assert RATIOS["16:9"] == (1024, 576)
    assert sizes_of(32, 8)["4:3"] == (32, 24)


def test_defaults_are_the_sampler_s() -> None:
    from bagel.settings import EDIT_FLOW, FlowSettings

    defaults = {tab: {s.name: s.default for s in settings_of(tab)} for tab in SETTINGS}
    assert {s.name for s in ADVANCED["draw"]} - {"preset"} <= FlowSettings.__dataclass_fields__.keys()
    assert flow_of(defaults["draw"]) == FlowSettings()
    assert flow_of(defaults["edit"]) == EDIT_FLOW
    with pytest.raises(BagelError, match="temperature"):
        text_of(defaults["ask"] | {"do_sample": True, "temperature": 0.0})


def test_every_language_has_every_text() -> None:
    assert set(TEXTS) == set(LANGUAGES)
    for language, texts in TEXTS.items():
        assert texts.keys() == TEXTS["en"].keys(), language
        for key, text in texts.items():
            assert text.count("{}") == TEXTS["en"][key].count("{}"), (language, key)
    latin = {word for text in TEXTS["zh"].values() for word in re.findall(r"[A-Za-z]{2,}", text)}
    assert latin <= {"BAGEL", "GB", "GiB", "MB", "resident", "PNG", "JPEG", "WebP"}


def test_pictures_and_prompts_of_visitors(tmp_path: Path) -> None:
    good = tmp_path / "a.jpg"
    Image.new("RGB", (8, 8)).save(good)
    assert read_picture(good).size == (8, 8)
    gif = tmp_path / "b.png"
    Image.new("P", (8, 8)).save(gif, "GIF")
    with pytest.raises(InputError, match="PNG, JPEG or WebP"):
        read_picture(gif)
    assert read_prompts("a\n\n b \n") == ["a", "b"]
    with pytest.raises(InputError, match="There are 0 prompts"):
        read_prompts("\n")


def test_settings_of_a_picture_never_name_a_folder(tmp_path: Path) -> None:
    from bagel.settings import FlowSettings, TextSettings

    found = picture_settings("/home/somebody/out/nf4", "x", 1, (32, 32), FlowSettings(), TextSettings())
    assert found["model"] == "nf4"
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=png_info(found))
    assert read_settings(tmp_path / "a.png")["thinking"]["max_tokens"] == 1000
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    with pytest.raises(InputError, match="holds no settings"):
        read_settings(tmp_path / "b.png")


def test_turns_with_places_for_pictures() -> None:
    pytest.importorskip("gradio")
    from bagel_compress.app.runs import turns_of

    a, b = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8))
    assert turns_of("make it night", [a, b]) == [a, b, "make it night"]
    assert turns_of("put the cat of <2> into <1>", [a, b]) == ["put the cat of", b, "into", a]
    assert turns_of("a <3> b", [a]) == [a, "a <3> b"]


@pytest.mark.parametrize(("target", "previews"), [("12gb-resident", False), ("8gb", False), ("nano", True)])
def test_a_model_that_a_target_places_draws_what_it_draws_elsewhere(target: str, previews: bool) -> None:
    """The page's own way of opening, on the CPU: parts that wait are moved there and back."""
    [placed] = open_models([str(NANO)], "cpu", target)
    [plain] = open_models([str(NANO)], "cpu", None)
    assert (placed.place, placed.previews, plain.place, plain.previews) == (target, previews, "cpu", True)
    drawn, previewed = [], []
    for model in (placed, plain):
        events = list(run(model, ["a red circle"], threading.Event(), size=(32, 32), flow=FlowSettings(12), seed=7))
        drawn.append(next(e.result.image for e in events if isinstance(e, Finished)))
        previewed.append(any(isinstance(e, StepMade) and e.preview is not None for e in events))
    assert drawn[0].tobytes() == drawn[1].tobytes()
    assert previewed == [previews, True]


def test_the_difference_is_made_visible() -> None:
    a = Image.new("RGB", (8, 8), (10, 10, 10))
    shown, gain, largest = difference(a, Image.new("RGB", (8, 8), (13, 10, 10)))
    assert (gain, largest, shown.getpixel((0, 0))) == (64, 3, (192, 0, 0))


def test_a_preview_has_the_picture_s_size(fp32: Any) -> None:
    rows, columns = 8, 6
    packed = fp32.normal((rows * columns, fp32.bagel.config.latent_width), fp32.generator(0))
    stride = fp32.bagel.config.image_stride
    assert small_picture(fp32, packed, (rows, columns)).size == (columns * stride, rows * stride)


@pytest.mark.parametrize("options", [("--share",), ("--host", "0.0.0.0")])
def test_strangers_need_a_password(cli: Any, tiny: Path, options: tuple[str, ...]) -> None:
    code, _, err = cli("app", tiny, *options)
    assert code == 2
    assert "--password" in err
