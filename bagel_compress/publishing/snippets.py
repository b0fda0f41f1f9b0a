"""Code for model cards that opens a build, with this toolkit and with other libraries. The tests execute it.

A snippet for a format is included only if the artifact has that format, and names one of its tensors. A snippet
downloads no more than it needs, and needs no GPU unless its note says so.
"""

from __future__ import annotations

from bagel_compress.build.artifact import Artifact
from bagel_compress.codecs import by_name
from bagel_compress.codecs.traits import Snippet
from bagel_compress.exporting.manifest import ExportFolder


def snippets(artifact: Artifact, repo: str) -> list[Snippet]:
    """The snippets that apply to an artifact: first this toolkit's, then one per format, then other applications."""
    units = artifact.manifest.units.values()
    stored = {unit.codec.format for unit in units if not unit.codec.stored_as_is}
    found = [_command(repo), _python(repo)]
    for name in by_name():
        if name in stored:
            unit = next(unit for unit in units if unit.codec.format == name)
            found += unit.codec.snippets(repo, next(iter(unit.tensors)), unit.shard, alone=stored == {name})
    return [*found, _official(repo), _comfyui(repo), _onnx(repo)]


def export_snippets(export: ExportFolder, repo: str) -> list[Snippet]:
    """The snippets of an export: command line, one block in the runtime alone, the whole sampler in Python."""
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
        "Runs one block; all have named inputs and outputs. The fusion is switched off because it would unpack"
        " compressed weights in every pass."
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
    return Snippet("tensorrt-rtx", text, ("tensorrt_rtx",), note="Loads one block; needs the GPU.", cuda=True)


def _graph_sampler(repo: str, extra: str, cuda: bool) -> Snippet:
    text = f"""
import bagel_compress as bc
from bagel.settings import TextSettings

sampler = bc.open_model("{repo}", device="auto")
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
import bagel_compress as bc
from bagel.settings import TextSettings

sampler = bc.open_model("{repo}")  # device="cuda" for a GPU
print(sampler.run(["why is the sky blue?"], output="text", text=TextSettings(max_tokens=64)).text)
"""
    return Snippet("Python", text, ("torch",), note="`pip install bagel-compress`")


def _official(repo: str) -> Snippet:
    text = f"""
from bagel_compress.interop import official_inferencer

inferencer = official_inferencer("{repo}")
inferencer(text="a red teapot on a wooden table")["image"].save("teapot.png")
"""
    note = (
        "Run it in a clone of ByteDance-Seed/Bagel with its packages: the official model and sampler then use the"
        " weights as they are stored. Its pinned `huggingface_hub` is too old to download the build; pass a folder that"
        " `hf download` made instead."
    )
    return Snippet("Official BAGEL code", text, ("modeling",), note=note)


def _comfyui(repo: str) -> Snippet:
    text = f"""
pip install bagel-compress
bagel-compress comfyui install ComfyUI
hf download {repo} --local-dir ComfyUI/models/bagel/{repo.partition("/")[2]}
"""
    note = (
        "Install with the Python that runs ComfyUI. The nodes, in the menu BAGEL, open every format; workflows come"
        " with them."
    )
    return Snippet("ComfyUI nodes", text, (), "sh", note)


def _onnx(repo: str) -> Snippet:
    name = repo.partition("/")[2]
    text = f"""
hf download {repo} --local-dir {name}
bagel-compress export {name} ort-cpu --out {name}-onnx
bagel-compress ask {name}-onnx "why is the sky blue?" --max-tokens 64
"""
    note = "Compressed weights stay compressed in the graphs. `pip install 'bagel-compress[onnx]'`"
    return Snippet("ONNX Runtime", text, ("onnx", "onnxscript", "onnxruntime"), "sh", note)
