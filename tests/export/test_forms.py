"""Compressed artifacts as graphs: each form carries its codec's codes, and errs no more than the codec's own decode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from bagel.sampler import Sampler
from bagel_compress.build.artifact import Artifact
from bagel_compress.errors import ExportError
from bagel_compress.exporting.manifest import ExportFolder
from bagel_compress.exporting.onnx_weights import pack_int4
from bagel_compress.exporting.ort_session import DISABLED_OPTIMIZERS, Sessions
from bagel_compress.exporting.source import WeightSource
from bagel_compress.run.load import open_model

LAYERS = ("und_layer", "gen_layer")
MARGIN = 1.1  # a graph may err this much more than the codec's own decode


def layer_inputs(fp32: Sampler) -> dict[str, np.ndarray]:
    """What layer 1 sees while an image is denoised after a prompt: real activations of the tiny model."""
    taps: dict[str, torch.Tensor] = {}
    context = fp32.bagel.new_context()
    fp32.bagel.prefill_text([context], [fp32.text.turn("a red cat sits on the old house")])
    noise = torch.randn(24, fp32.bagel.config.latent_width, generator=torch.Generator().manual_seed(1))
    block = fp32.bagel.noisy_block(noise, torch.tensor(0.7), [(4, 6)], fp32.wrap)
    fp32.bagel.velocity(block, [context], taps.__setitem__)
    rows, (k, v) = taps["layer0"].numpy(), context.keys_values(1)
    cos, sin = fp32.bagel.rope(torch.tensor([context.rope]))
    half = fp32.bagel.config.llm.head_dim // 2
    return {
        "wrappers": rows[[0, -1]],
        "latents": rows[1:-1],
        "past_k": k.transpose(0, 1)[None].numpy(),
        "past_v": v.transpose(0, 1)[None].numpy(),
        "cos": cos[None, :, :half].numpy(),
        "sin": sin[None, :, :half].numpy(),
        "wanted": taps["layer1"].numpy()[1:-1],
    }


def run_gen_layer(folder: ExportFolder, inputs: dict[str, np.ndarray]) -> np.ndarray:
    half = folder.manifest.settings.precision == "fp16"
    feeds = {n: a.astype(np.float16) if half and n not in ("cos", "sin") else a for n, a in inputs.items()}
    feeds.pop("wanted")
    found = Sessions(folder, threads=1).run("gen_layer_01", {n: np.ascontiguousarray(a) for n, a in feeds.items()})
    return np.asarray(found[1].numpy(), np.float32)


def torch_error(path: Path, inputs: dict[str, np.ndarray], dynamic: bool) -> float:
    """Error of the layer with the codec's weights, in fp32 arithmetic; `dynamic`: and rows of 8 bits, per tensor."""
    source = WeightSource.open(path)
    layer = Sampler.from_dir(Path(__file__).parents[1] / "data/golden/checkpoint", dtype=torch.float32).bagel.layers[1]
    for name, parameter in layer.named_parameters():
        parameter.data = unrounded(source, f"layers.1.{name}")
    for module in layer.modules():
        if dynamic and isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, x: (rounded_to_8_bits(x[0]),))
    rows = torch.from_numpy(np.concatenate([inputs["wrappers"], inputs["latents"]]))
    rope = tuple(torch.from_numpy(np.concatenate([inputs[n][0]] * 2, -1)).expand(len(rows), -1) for n in ("cos", "sin"))

    def attend(_: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        from bagel.layers import attention

        past = [torch.from_numpy(inputs[n][0]).transpose(0, 1) for n in ("past_k", "past_v")]
        return attention([q], [torch.cat([past[0], k])], [torch.cat([past[1], v])], causal=False)

    with torch.no_grad():
        return relative(layer(rows, 2, rope, attend, True)[2:].numpy(), inputs["wanted"])


def unrounded(source: WeightSource, path: str) -> torch.Tensor:
    """The codec's value before `decode` rounds it to bf16, which int8 codes of bf16 weights profit from by a fifth."""
    if source.codec(path).format != "int8":
        return source.tensor(path).float()
    item = source.encoded(path)
    scb = item.parts[item.spec.name.removesuffix("weight") + "SCB"]
    return item.parts[item.spec.name].float() * scb[:, None] / 127


def rounded_to_8_bits(x: torch.Tensor) -> torch.Tensor:
    """What DynamicQuantizeLinear makes of a tensor."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = (high - low) / 255
    zero = round(-low / scale)
    return ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale


@pytest.mark.parametrize(
    ("codec", "settings", "form"),
    [
        ("int8", {}, "qdq"),
        ("int8", {"activations": "dynamic"}, "dynamic"),
        ("fp8", {}, "qdq"),
        ("int4", {}, "int4"),
        ("int4", {"activations": "blocks"}, "int4"),
        ("nf4", {}, "bnb4"),
        ("{format: nf4, double_quant: true}", {}, "bnb4"),
        ("df11", {}, "dense"),
        pytest.param("int8", {"precision": "fp16"}, "qdq", marks=pytest.mark.slow),
        pytest.param("int4", {"precision": "fp16"}, "int4", marks=pytest.mark.slow),
        pytest.param("raw", {"precision": "fp16"}, "dense", marks=pytest.mark.slow),
    ],
)
def test_a_form_errs_no_more_than_its_codec(
    codec: str,
    settings: dict[str, str],
    form: str,
    artifact: Callable[[str], Path],
    make: Callable[..., ExportFolder],
    fp32: Sampler,
) -> None:
    path = artifact(codec)
    folder = make(WeightSource.open(path), blocks=LAYERS, **settings)
    assert folder.manifest.blocks["gen_layer_01"].forms == {form: 14}
    inputs = layer_inputs(fp32)
    mine, codecs = (
        relative(run_gen_layer(folder, inputs), inputs["wanted"]),
        torch_error(path, inputs, form == "dynamic"),
    )
    floor = 2e-3 if settings.get("precision") == "fp16" else 1e-5  # of the precision itself, on exact weights
    assert mine <= MARGIN * codecs + floor


def test_graphs_use_the_standard_operators(artifact: Callable[[str], Path], make: Callable[..., ExportFolder]) -> None:
    folder = make(WeightSource.open(artifact("fp8")), blocks=LAYERS)
    model = onnx.load(folder.path / "gen_layer_01.onnx", load_external_data=False)
    kinds = {i.name: i.data_type for i in model.graph.initializer}
    assert kinds["gen.up_proj.weight.codes"] == onnx.TensorProto.FLOAT8E4M3FN
    nodes = [n for n in model.graph.node if n.op_type == "DequantizeLinear"]
    assert len(nodes) == 14
    assert all(n.attribute[0].i == 1 for n in nodes if n.attribute[0].name == "axis")


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_no_matrix_is_unpacked_in_every_pass(
    codec: str, artifact: Callable[[str], Path], make: Callable[..., ExportFolder], tmp_path: Path
) -> None:
    """The runtime reads codes inside its products; a DequantizeLinear that is left unpacks a matrix each time."""
    folder = make(WeightSource.open(artifact(codec)), blocks=LAYERS)
    sessions = Sessions(folder, threads=1)
    options = sessions.session_options()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    graph = str(folder.path / "gen_layer_00.onnx")
    onnxruntime.InferenceSession(
        graph, options, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED_OPTIMIZERS
    )
    left = [n.op_type for n in onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node]
    assert left.count("MatMulNBits") == 14
    assert "DequantizeLinear" not in left


def test_nf4_bytes_are_those_of_the_artifact(
    artifact: Callable[[str], Path], make: Callable[..., ExportFolder]
) -> None:
    path = artifact("nf4")
    folder = make(WeightSource.open(path), blocks=LAYERS)
    entry = folder.manifest.blocks["und_layer_02"].weights["und.down_proj.weight.codes"]
    with (folder.path / "layer_02.data").open("rb") as file:
        file.seek(entry.offset)
        carried = file.read(entry.bytes)
    name = "language_model.model.layers.2.mlp.down_proj.weight"
    assert carried == Artifact.open(path).parts(name)[name].numpy().tobytes()


def test_int4_nibbles_are_low_first() -> None:
    codes = np.array([1, -1, 7, -8, 3], np.int8)
    assert pack_int4(codes).tolist() == [0xF1, 0x87, 0x03]


def test_nf4_is_refused_for_tensorrt_before_anything_is_written(
    artifact: Callable[[str], Path], make: Callable[..., ExportFolder], tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=r"layers\.0.*TensorRT has no NF4"):
        make(WeightSource.open(artifact("nf4")), runtime="tensorrt-rtx", precision="bf16", blocks=LAYERS)
    assert not (tmp_path / "out").exists()


def test_the_whole_sampler_runs_on_int8(
    artifact: Callable[[str], Path], make: Callable[..., ExportFolder], fp32: Sampler
) -> None:
    from bagel_compress.exporting.ort_sampler import open_onnx

    path = artifact("int8")
    mine = open_onnx(make(WeightSource.open(path)).path, threads=1)
    theirs = open_model(path, dtype=torch.float32)
    turn = fp32.text.turn("a red cat")
    rows = []
    for sampler in (mine, theirs, fp32):
        context = [sampler.bagel.new_context()]
        sampler.bagel.prefill_text(context, [turn])
        rows.append(np.asarray(sampler.bagel.next_logits(context, [fp32.text.bos])))
    assert relative(rows[0], rows[2]) <= MARGIN * relative(rows[1], rows[2]) + 1e-4


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
