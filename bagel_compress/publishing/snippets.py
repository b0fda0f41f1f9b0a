"""How to open an artifact in each ecosystem that can: the text that stands on the card, and that the tests execute.

A snippet is offered only where the artifact holds that format; it names a tensor that is really there. None of them
downloads more than it shows, and none needs a GPU unless it says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from bagel_compress.build.artifact import Artifact
from bagel_compress.exporting.manifest import ExportFolder


@dataclass(frozen=True)
class Snippet:
    """One way in. `needs` are the packages it imports; `cuda` is set where it cannot run without a GPU."""

    title: str
    text: str
    needs: tuple[str, ...]
    language: str = "python"
    note: str = ""
    cuda: bool = False


def snippets(artifact: Artifact, repo: str) -> list[Snippet]:
    """All that apply, ours first."""
    formats = {unit.codec.format for unit in artifact.manifest.units.values()}
    found = [_command(repo), _python(repo)]
    if "nf4" in formats:
        found.append(_nf4(artifact, repo))
    if "int8" in formats:
        found.append(_int8(artifact, repo))
    found += [_compressed_tensors(artifact, repo, name) for name in ("fp8", "int4") if name in formats]
    if formats - {"raw"} == {"df11"}:
        found += [_dfloat11(repo), _comfyui(repo)]
    if (
        formats <= {"raw", "fp8"}
        and "fp8" in formats
        and _granularity(artifact, _example(artifact, "fp8")[0]) == "tensor"
    ):
        found.append(_comfyui_file(repo))
    return [*found, _onnx(repo)]


def export_snippets(export: ExportFolder, repo: str) -> list[Snippet]:
    """Of an export: the runtime alone, then the whole sampler."""
    cuda = export.manifest.settings.runtime != "onnxruntime"
    alone = _engine(repo) if cuda else _session(repo)
    extra = "tensorrt" if cuda else "onnx-gpu" if export.manifest.settings.provider == "cuda" else "onnx"
    return [_command(repo, extra, cuda), alone, _graph_sampler(repo, extra, cuda)]


def _session(repo: str) -> Snippet:
    text = f"""
import numpy as np, onnxruntime
from huggingface_hub import snapshot_download

folder = snapshot_download("{repo}")
session = onnxruntime.InferenceSession(f"{{folder}}/embed.onnx", disabled_optimizers=["MatMulAddFusion"])
print(session.run(None, {{"ids": np.array([1, 2, 3])}})[0])
"""
    note = (
        "One block; all have named inputs and outputs. The fusion is switched off because it would unpack compressed"
        " weights in every pass."
    )
    return Snippet("onnxruntime", text, ("onnxruntime",), note=note)


def _engine(repo: str) -> Snippet:
    text = f"""
import tensorrt_rtx
from huggingface_hub import hf_hub_download

data = open(hf_hub_download("{repo}", "gen_layer_00.engine"), "rb").read()
engine = tensorrt_rtx.Runtime(tensorrt_rtx.Logger()).deserialize_cuda_engine(data)
print([engine.get_tensor_name(index) for index in range(engine.num_io_tensors)])
"""
    return Snippet("tensorrt-rtx", text, ("tensorrt_rtx",), note="One block; needs the card.", cuda=True)


def _graph_sampler(repo: str, extra: str, cuda: bool) -> Snippet:
    text = f"""
from bagel.settings import TextSettings
from bagel_compress.exporting.ort_sampler import open_onnx
from bagel_compress.run.fetch import fetch

sampler = open_onnx(fetch("{repo}"))
print(sampler.run(["why is the sky blue?"], output="text", text=TextSettings(max_tokens=64)).text)
"""
    note = f"The whole sampler: pictures, edits, answers. `pip install 'bagel-compress[{extra}]'`"
    return Snippet("Python", text, ("onnxruntime",), note=note, cuda=cuda)


def _command(repo: str, extra: str = "", cuda: bool = False) -> Snippet:
    package = f"'bagel-compress[{extra}]'" if extra else "bagel-compress"
    text = f"""
pip install {package}
bagel-compress generate {repo} "a red teapot on a wooden table" --out teapot.png
"""
    note = "Downloads what is needed, checks every digest, draws a picture. `edit` and `ask` take pictures."
    return Snippet("Command line", text, (), "sh", note, cuda)


def _python(repo: str) -> Snippet:
    text = f"""
from bagel.settings import TextSettings
from bagel_compress.run.load import open_model

sampler = open_model("{repo}")  # device="cuda" where there is one
print(sampler.run(["why is the sky blue?"], output="text", text=TextSettings(max_tokens=64)).text)
"""
    return Snippet("Python", text, ("torch",), note="`pip install bagel-compress`")


def _nf4(artifact: Artifact, repo: str) -> Snippet:
    name, shard = _example(artifact, "nf4")
    text = f"""
import bitsandbytes as bnb
from huggingface_hub import hf_hub_download
from safetensors import safe_open

name = "{name}"
with safe_open(hf_hub_download("{repo}", "{shard}"), "pt") as shard:
    stored = {{key.removeprefix(name + "."): shard.get_tensor(key) for key in shard.keys() if key.startswith(name)}}
weight = bnb.nn.Params4bit.from_prequantized(stored.pop(name), stored, device="cpu")
print(bnb.functional.dequantize_4bit(weight.data, weight.quant_state))
"""
    return Snippet("bitsandbytes", text, ("bitsandbytes",), note=_part("4-bit weight"))


def _int8(artifact: Artifact, repo: str) -> Snippet:
    name, shard = _example(artifact, "int8")
    text = f"""
import bitsandbytes as bnb
from huggingface_hub import hf_hub_download
from safetensors import safe_open

name = "{name}"
with safe_open(hf_hub_download("{repo}", "{shard}"), "pt") as shard:
    codes, scale = shard.get_tensor(name), shard.get_tensor(name.removesuffix("weight") + "SCB")
layer = bnb.nn.Linear8bitLt(codes.shape[1], codes.shape[0], bias=False, has_fp16_weights=False, device="meta")
layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scale)
print(layer)
"""
    return Snippet("bitsandbytes", text, ("bitsandbytes",), note=_part("8-bit layer"))


def _compressed_tensors(artifact: Artifact, repo: str, form: str) -> Snippet:
    name, shard = _example(artifact, form)
    if form == "fp8":
        compressor, scheme = (
            "FloatQuantizationCompressor",
            f'num_bits=8, type="float", strategy="{_granularity(artifact, name)}"',
        )
    else:
        compressor, scheme = "PackedQuantizationCompressor", 'num_bits=4, type="int", strategy="group", group_size=32'
    text = f"""
from compressed_tensors.compressors import {compressor}
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from huggingface_hub import hf_hub_download
from safetensors import safe_open

name = "{name}"
with safe_open(hf_hub_download("{repo}", "{shard}"), "pt") as shard:
    found = {{key.removeprefix(name): shard.get_tensor(key) for key in shard.keys() if key.startswith(name)}}
stored = {{"weight" + suffix: tensor for suffix, tensor in found.items()}}
scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs({scheme}))
print({compressor}.decompress(stored, scheme)["weight"])
"""
    return Snippet(f"compressed-tensors ({form})", text, ("compressed_tensors",), note=_part("weight"))


def _dfloat11(repo: str) -> Snippet:
    text = f"""
from dfloat11 import DFloat11Model
from huggingface_hub import snapshot_download

folder = snapshot_download("{repo}", allow_patterns=["*.json", "model-*.safetensors"])
DFloat11Model.from_pretrained(folder, bfloat16_model=model, device="cpu", device_map=None)
"""
    note = "`model` is the official `Bagel` in bfloat16 without weights; they are decoded on the GPU as they are used."
    return Snippet("dfloat11", text, ("dfloat11",), note=note, cuda=True)


def _comfyui(repo: str) -> Snippet:
    name = repo.partition("/")[2]
    folder = name if "df11" in name.lower() or "dfloat11" in name.lower() else f"{name}-DF11"
    note = "The ComfyUI-BAGEL nodes know this format by the folder's name; run this where ComfyUI is."
    return Snippet("ComfyUI", f"hf download {repo} --local-dir models/bagel/{folder}", (), "sh", note)


def _comfyui_file(repo: str) -> Snippet:
    text = f"""
from pathlib import Path
from bagel_compress.build.comfyui_file import comfyui_file
from bagel_compress.run.fetch import open_artifact

comfyui_file(open_artifact("{repo}"), Path("{repo.partition("/")[2]}_fp8_e4m3fn_scaled.safetensors"))
"""
    return Snippet("ComfyUI", text, (), note="Writes the single `fp8_scaled` file that ComfyUI's loaders read.")


def _onnx(repo: str) -> Snippet:
    name = repo.partition("/")[2]
    text = f"""
hf download {repo} --local-dir {name}
bagel-compress export {name} ort-cpu --out {name}-onnx
bagel-compress ask {name}-onnx "why is the sky blue?" --max-tokens 64
"""
    note = "Compressed weights stay compressed in the graphs. `pip install 'bagel-compress[onnx]'`"
    return Snippet("ONNX Runtime", text, ("onnx", "onnxscript", "onnxruntime"), "sh", note)


def _part(what: str) -> str:
    return f"One {what}, read without decoding or quantising anything again."


def _example(artifact: Artifact, form: str) -> tuple[str, str]:
    """The first tensor in a format, and its shard."""
    unit = next(unit for unit in artifact.manifest.units.values() if unit.codec.format == form)
    return next(iter(unit.tensors)), unit.shard


def _granularity(artifact: Artifact, name: str) -> str:
    return str(artifact.manifest.units[artifact.manifest.unit_of[name]].codec.model_dump()["granularity"])
