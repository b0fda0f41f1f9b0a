"""Engines of the tiny model, really built, for every precision that a target allows; what is refused and how."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from export_targets import target

from bagel_compress.errors import ExportError, MissingExtraError
from bagel_compress.exporting import tensorrt
from bagel_compress.exporting.manifest import ExportFolder
from bagel_compress.exporting.profiles import axis_ranges, check_shapes, profile
from bagel_compress.exporting.source import WeightSource
from bagel_compress.run.export_settings import ExportSettings, Range

pytest.importorskip("tensorrt_rtx")
LAYERS = ("und_layer", "gen_layer")
RTX = {"runtime": "tensorrt-rtx", "capabilities": ("sm89", "sm120")}


@pytest.mark.parametrize(
    ("codec", "precision", "kinds"),
    [
        ("raw", "bf16", LAYERS),
        ("fp8", "bf16", ("gen_layer",)),
        ("int8", "bf16", ("gen_layer",)),
        ("int4", "bf16", ("gen_layer",)),
        pytest.param("raw", "fp16", LAYERS, marks=pytest.mark.slow),
    ],
)
def test_layers_build(
    codec: str,
    precision: str,
    kinds: tuple[str, ...],
    artifact: Callable[[str], Path],
    make: Callable[..., ExportFolder],
) -> None:
    folder = make(WeightSource.open(artifact(codec)), **RTX, precision=precision, blocks=kinds)
    for name in (f"{kind}_01" for kind in kinds):
        entry = folder.manifest.blocks[name]
        assert (folder.path / entry.engine).stat().st_size > 10_000
        assert folder.manifest.files[entry.engine].bytes == (folder.path / entry.engine).stat().st_size
    assert folder.verify() == []


@pytest.mark.slow
def test_the_ends_and_the_autoencoder_build(tiny: Path, make: Callable[..., ExportFolder]) -> None:
    kinds = ("embed", "vit", "latent_in", "latent_out", "lm_head", "vae_encoder", "vae_decoder")
    folder = make(WeightSource.open(tiny), **RTX, precision="bf16", blocks=kinds)
    assert {e.kind for e in folder.manifest.blocks.values() if (folder.path / e.engine).is_file()} == set(kinds)


@pytest.mark.parametrize(
    ("settings", "codec", "message"),
    [
        ({"precision": "bf16", "capabilities": ("sm75",)}, "raw", "sm75 has no bf16"),
        ({"precision": "bf16", "capabilities": ("sm86",)}, "fp8", "sm86 has no fp8, which needs sm89 or later"),
        ({"precision": "bf16", "capabilities": ("sm90",)}, "raw", "capability sm90 is unknown"),
        ({"precision": "bf16", "axes": {"frames": {"min": 1, "opt": 1, "max": 2}}}, "raw", "axes has 'frames'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    settings: dict[str, object],
    codec: str,
    message: str,
    artifact: Callable[[str], Path],
    make: Callable[..., ExportFolder],
    tmp_path: Path,
) -> None:
    with pytest.raises(ExportError, match=message):
        make(WeightSource.open(artifact(codec)), runtime="tensorrt-rtx", blocks=LAYERS, **settings)
    assert not (tmp_path / "out").exists()


def test_a_rejected_operator_names_block_node_and_advice(
    artifact: Callable[[str], Path], make: Callable[..., ExportFolder]
) -> None:
    folder = make(WeightSource.open(artifact("nf4")), blocks=LAYERS)
    entry = folder.manifest.blocks["gen_layer_00"]
    settings = ExportSettings(runtime="tensorrt-rtx", precision="bf16")
    with pytest.raises(ExportError, match=r"block gen_layer_00: .*MatMulBnb4.*int4 in place of nf4"):
        tensorrt.build_engine("gen_layer_00", entry, folder.path / entry.model, settings, folder.manifest.axes)


def test_profiles_follow_the_target(exported: ExportFolder) -> None:
    config = exported.manifest.model
    axes = axis_ranges(target().sizes, config, {"tokens": Range(min=1, opt=2, max=3)})
    assert axes["latent_tokens"].max == (128 // 16) ** 2
    assert axes["tokens"].max == 3
    shapes = profile(exported.manifest.blocks["und_layer_00"], axes)
    assert shapes["x"] == ((1, 64), (2, 64), (3, 64))
    assert shapes["past_k"][0] == (1, 2, 0, 16)
    assert shapes["past_k"][2][2] > 64 + 64


def test_sizes_outside_the_profile_are_named(exported: ExportFolder) -> None:
    axes = axis_ranges(target().sizes, exported.manifest.model, {})
    entry = exported.manifest.blocks["embed"]
    check_shapes("embed", entry, axes, {"ids": (1,)})
    with pytest.raises(ExportError, match=r"block embed: tokens is 9999, the engine was built for 1 to"):
        check_shapes("embed", entry, axes, {"ids": (9999,)})


def test_classic_tensorrt_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match="runtime tensorrt needs tensorrt; install"):
        tensorrt.load_tensorrt("tensorrt")


def test_engines_without_a_card_are_an_error(tiny: Path, make: Callable[..., ExportFolder]) -> None:
    import torch

    from bagel_compress.exporting.ort_sampler import open_onnx

    if torch.cuda.is_available():
        pytest.skip("has a card")
    folder = make(WeightSource.open(tiny), **RTX, precision="bf16", blocks=("latent_out",))
    with pytest.raises(ExportError, match="need an NVIDIA GPU"):
        open_onnx(folder.path)
