"""The nodes as ComfyUI loads and runs them: the example workflows on BAGEL-nano, cancelling, and memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from comfy_standin import Comfy, Interrupted, to_pixels
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensor

from bagel.nano.scenes import render, sample_scene
from bagel.sampler import Sampler
from bagel.settings import EDIT_FLOW, FlowSettings, TextSettings
from bagel_compress.errors import BagelCompressError, InputError
from bagel_compress.io.packaged import FULL_CONFIGS, resource

NANO = FULL_CONFIGS.parent / "BAGEL-nano"
FLOWS = resource("exports") / "comfyui"
STEPS = 6
QUICK = {"num_timesteps": STEPS, "max_new_tokens": 64}


@pytest.fixture
def comfy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., tuple[int, str, str]]) -> Iterator[Comfy]:
    """A ComfyUI with our nodes installed, and a scene of BAGEL-nano as the example picture."""
    comfy = Comfy(tmp_path / "ComfyUI", monkeypatch)
    assert cli("comfyui", "install", comfy.folder)[0] == 0
    Image.fromarray(render(sample_scene(np.random.default_rng(3)))).save(comfy.folder / "input" / "example.png")
    comfy.start()
    yield comfy
    comfy.unload_all()


@pytest.fixture(scope="module")
def nano() -> Sampler:
    return Sampler.from_dir(NANO)


def test_the_example_workflows_give_what_the_sampler_gives(comfy: Comfy, nano: Sampler) -> None:
    """Every workflow that install put beside the nodes, with the values that its file has, in fewer steps."""
    flows = {file.stem: file for file in (comfy.folder / "custom_nodes" / "bagel-compress").rglob("*.json")}
    assert set(flows) == {file.stem for file in FLOWS.glob("*.json")}
    prompt = "a red circle left of a blue square on a white background"
    drawn = nano.run([prompt], size=(32, 32), flow=FlowSettings(STEPS), seed=7).image
    example = sample_picture(comfy)

    ends = comfy.run(flows["text_to_image"], **QUICK)
    assert np.array_equal(to_pixels(ends["SaveImage"][0]), np.asarray(drawn))
    assert ends["PreviewAny"] == [""]
    assert comfy.steps == [(step + 1, STEPS - 1) for step in range(STEPS - 1)]
    assert [picture.size for picture in comfy.previews] == [(8, 8)] * (STEPS - 1)

    flow = FlowSettings(STEPS, cfg_img_scale=2.0, cfg_interval=(0.0, 1.0), cfg_renorm_type=EDIT_FLOW.cfg_renorm_type)
    edited = nano.run([example, "make the circle green"], flow=flow, seed=7).image
    assert np.array_equal(to_pixels(comfy.run(flows["image_edit"], **QUICK)["SaveImage"][0]), np.asarray(edited))

    asked = nano.run([example, "what color is the background?"], output="text", text=TextSettings(64)).text
    assert comfy.run(flows["image_understanding"], **QUICK)["PreviewAny"] == [asked]
    assert comfy.texts[-1] == asked

    ends = comfy.run(flows["compare_two_builds"], **QUICK)
    a, b, difference = ends["PreviewImage"]
    assert np.array_equal(to_pixels(a), np.asarray(drawn))
    assert a.equal(b)
    assert difference.abs().max() == 0
    assert ends["PreviewAny"] == ["equal"]


def sample_picture(comfy: Comfy) -> Image.Image:
    return Image.open(comfy.folder / "input" / "example.png").convert("RGB")


def tensor_bytes() -> int:
    """Bytes of all tensors that somebody holds."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if is_tensor(t)}
    return sum(found.values())


def is_tensor(value: object) -> bool:
    if not issubclass(type(value), torch.Tensor) or issubclass(type(value), FakeTensor):  # of a budget somewhere else
        return False
    return not value.is_meta  # type: ignore[attr-defined]


def test_a_node_that_is_cancelled_half_way_frees_its_memory(comfy: Comfy) -> None:
    """ComfyUI keeps the exception; contexts and latents are gone all the same."""
    comfy.run(FLOWS / "image_edit.json", **QUICK)
    before, during = tensor_bytes(), 0
    comfy.steps.clear()
    comfy.cancel_at = STEPS // 2
    stop = comfy.stop_if_asked

    def watched() -> None:
        nonlocal during
        during = tensor_bytes()
        stop()

    comfy.module("comfy.model_management", throw_exception_if_processing_interrupted=watched)
    with pytest.raises(Interrupted) as caught:
        comfy.run(FLOWS / "image_edit.json", **QUICK)
    assert comfy.steps[-1] == (STEPS // 2, STEPS - 1)
    kept = tensor_bytes()
    assert during - before > 100_000  # two branches of contexts, six layers
    assert kept - before < 20_000  # the input picture, in this test's own variables
    assert caught.value.__traceback__ is not None


def test_memory_is_given_back_when_comfyui_asks(comfy: Comfy) -> None:
    first = comfy.run(FLOWS / "text_to_image.json", **QUICK)["SaveImage"][0]
    [patcher] = comfy.loaded
    assert patcher.model.model_loaded_weight_memory == patcher.size > 4_000_000
    bagel = weakref.ref(patcher.model.sampler.bagel)
    comfy.unload_all()
    assert bagel() is None
    assert patcher.model.model_loaded_weight_memory == 0
    assert comfy.run(FLOWS / "text_to_image.json", **QUICK)["SaveImage"][0].equal(first)
    assert comfy.loaded == [patcher]  # the loader's output was kept, and its weights were read again


@pytest.mark.loader
def test_builds_of_several_formats_open(comfy: Comfy, cli: Callable[..., tuple[int, str, str]]) -> None:
    """Put into models/bagel, they are listed; what each draws is what `open_model` draws, also placed by a target."""
    from bagel_compress.run.load import open_model

    prompt = "a red circle left of a blue square on a white background"
    for recipe, target in (("fp8-24gb", "12gb-resident"), ("df11", "none")):
        build = comfy.folder / "models" / "bagel" / recipe
        assert cli("compress", recipe, "--source", NANO, "--out", build)[0] == 0
        image = comfy.run(FLOWS / "text_to_image.json", model_path=recipe, target=target, num_timesteps=3)["SaveImage"][
            0
        ]
        drawn = open_model(build).run([prompt], size=(32, 32), flow=FlowSettings(3), seed=7).image
        assert np.array_equal(to_pixels(image), np.asarray(drawn))
        comfy.models.clear()
        comfy.unload_all()


def test_solvers_and_the_step_cache_are_the_sampler_s(comfy: Comfy, nano: Sampler) -> None:
    prompt = "a red circle left of a blue square on a white background"
    flow, chosen = FlowSettings(6, solver="ab2", cache_every=2), {"solver": "ab2", "cache_every": 2}
    image = comfy.run(FLOWS / "text_to_image.json", num_timesteps=6, **chosen)["SaveImage"][0]
    drawn = nano.run([prompt], size=(32, 32), flow=flow, seed=7).image
    assert np.array_equal(to_pixels(image), np.asarray(drawn))
    assert not np.array_equal(
        np.asarray(drawn), np.asarray(nano.run([prompt], size=(32, 32), flow=FlowSettings(6), seed=7).image)
    )
    comfy.models.clear()
    comfy.unload_all()
    with pytest.raises(InputError, match="has no preset 'fast'"):
        comfy.run(FLOWS / "text_to_image.json", num_timesteps=6, preset="fast")


def test_old_workflows_find_their_nodes_and_another_package_keeps_its_own(comfy: Comfy) -> None:
    """Order and names of ComfyUI-BAGEL's settings, as its saved workflows list the values."""
    nodes = comfy.nodes
    order = {name: list((i := nodes[name].INPUT_TYPES())["required"] | i["optional"]) for name in nodes}  # type: ignore[attr-defined]
    sampling = ["show_thinking", "cfg_interval", "timestep_shift", "cfg_renorm_min", "cfg_renorm_type"]
    assert order["BagelModelLoader"] == ["model_path", "allow_auto_download", "quantization_mode", "target"]
    assert order["BagelTextToImage"] == [
        "model", "prompt", "seed", "image_ratio", "cfg_text_scale", "num_timesteps", *sampling, "text_temperature",
        "solver", "cache_every", "cache_threshold", "cache_order", "guidance_every", "preset",
    ]  # fmt: skip
    assert order["BagelImageUnderstanding"][3:] == ["show_thinking", "do_sample", "text_temperature", "max_new_tokens"]
    assert order["BagelImageEdit"][4:7] == ["cfg_text_scale", "cfg_img_scale", "num_timesteps"]
    theirs = type("BagelModelLoader", (), {})
    comfy.nodes.clear()
    comfy.nodes["BagelModelLoader"] = theirs
    assert comfy.start()["BagelModelLoader"] is theirs
    assert "BagelCompressModelLoader" in comfy.nodes


def test_what_cannot_be_is_said_in_a_sentence(
    comfy: Comfy, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    loader, draw = comfy.nodes["BagelModelLoader"](), comfy.nodes["BagelTextToImage"]()
    for name, mode, says in (
        ("BAGEL-nano", "NF4", "full-precision checkpoint"),
        ("../../secret", "BF16", "not in models/bagel"),
        ("ByteDance-Seed/BAGEL-7B-MoT", "BF16", "allow_auto_download"),
    ):
        with pytest.raises(BagelCompressError, match=says):
            loader.load(name, False, mode)  # type: ignore[attr-defined]
    with pytest.raises(BagelCompressError, match="another node package"):
        draw.draw({"inferencer": None}, "x", 1, "1:1", cfg_text_scale=4.0, num_timesteps=STEPS)  # type: ignore[attr-defined]
    assert np.isnan(draw.IS_CHANGED(seed=0))  # type: ignore[attr-defined]
    assert "custom_nodes" in cli("comfyui", "install", tmp_path / "nowhere")[2]
    assert cli("comfyui", "a", "b", "--out", "c")[0] == 2
