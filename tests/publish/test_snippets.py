"""Every snippet of the card runs: the very text that stands there, against the local Hub, with an empty cache.

What needs CUDA to compute is run as far as it goes without: the dfloat11 package loads through the stub of its kernel.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub import Hub
from publish_data import BASE

from bagel_compress.build.artifact import Artifact
from bagel_compress.publishing.card_sections import Origin
from bagel_compress.publishing.release import make_release
from bagel_compress.publishing.snippets import Snippet, snippets
from bagel_compress.publishing.upload import upload

CASES = [
    ("raw", "Command line"), ("nf4", "Python"), ("nf4", "bitsandbytes"), ("int8-24gb", "bitsandbytes"),
    ("fp8-24gb", "compressed-tensors (fp8)"), ("mixed-16gb", "bitsandbytes"),
    ("mixed-16gb", "compressed-tensors (fp8)"), ("fp8-comfyui", "compressed-tensors (fp8)"), ("fp8-comfyui", "ComfyUI"),
    ("df11", "Python"), ("df11", "dfloat11"), ("df11", "ComfyUI"), ("df11", "ComfyUI nodes"),
    ("fp8-24gb", "Official BAGEL code"), ("comfyui-nvfp4", "compressed-tensors (nvfp4)"), ("fp8-vllm", "ComfyUI"),
    ("mxfp8-24gb", "compressed-tensors (mxfp8)"), ("comfyui-int8", "compressed-tensors (int8)"),
    ("w4a16-vllm", "Python"), ("nvfp4-16gb", "compressed-tensors (nvfp4)"),
]  # fmt: skip
SLOW = [("int8-24gb", "ONNX Runtime"), ("mixed-16gb", "ONNX Runtime")]
Online = Callable[[str], tuple[Artifact, str]]


@pytest.fixture
def online(
    hub: Hub, built: Callable[[str], Artifact], fresh_cache: Callable[[], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Online:  # fmt: skip
    """Publishes a build of a recipe (as a draft: reports are not the matter here) and gives it and its repository."""

    def go(recipe: str) -> tuple[Artifact, str]:
        artifact, repo = built(recipe), f"ann/BAGEL-7B-MoT-{recipe}"
        upload(make_release(artifact, tmp_path / "release", Origin(repo, BASE), draft=True), repo)
        fresh_cache()
        monkeypatch.chdir(tmp_path)
        return artifact, repo

    return go


def find(artifact: Artifact, repo: str, title: str) -> Snippet:
    return next(s for s in snippets(artifact, repo) if s.title == title)


@pytest.mark.parametrize(("recipe", "title"), [*CASES, *(pytest.param(*c, marks=pytest.mark.slow) for c in SLOW)])
def test_it_runs(
    recipe: str,
    title: str,
    online: Online,
    tmp_path: Path,
    cli: Callable[..., tuple[int, str, str]],
    bnb_decoded: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    artifact, repo = online(recipe)
    snippet = find(artifact, repo, title)
    for package in snippet.needs:
        if package != "modeling" and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    if title == "ComfyUI nodes":
        (tmp_path / "ComfyUI" / "custom_nodes").mkdir(parents=True)
    if snippet.language == "sh":
        run_shell(snippet.text, cli)
        if title == "ComfyUI":
            folder = tmp_path / "models" / "bagel" / f"BAGEL-7B-MoT-{recipe}"
            assert (folder / "vae" / "ae.safetensors").exists()
            assert Artifact.open(folder).verify() == []
        elif title == "ComfyUI nodes":
            assert (tmp_path / "ComfyUI" / "custom_nodes" / "bagel-compress" / "__init__.py").exists()
            assert Artifact.open(tmp_path / "ComfyUI" / "models" / "bagel" / f"BAGEL-7B-MoT-{recipe}").verify() == []
        elif title == "Command line":
            assert (tmp_path / "teapot.png").exists()
        return
    found = run_python(snippet, artifact, monkeypatch)
    if recipe == "fp8-comfyui" and title == "ComfyUI":
        comfyui_reads(tmp_path / "BAGEL-7B-MoT-fp8-comfyui_fp8_e4m3fn_scaled.safetensors", artifact)
    if title == "bitsandbytes" and recipe != "int8-24gb":
        expected = decoded(artifact, found["name"])
        shown = bnb_decoded(found["weight"].data, found["weight"].quant_state)
        assert torch.equal(shown, expected)
    if title.startswith("compressed-tensors"):
        compressor = next(value for key, value in found.items() if key.endswith("Compressor"))
        theirs = compressor.decompress(found["stored"], found["scheme"])["weight"]
        theirs = theirs.bfloat16()  # int8's come as fp32, as its scales are
        assert torch.equal(theirs, decoded(artifact, found["name"]))
    if title == "bitsandbytes" and recipe == "int8-24gb":
        x = torch.eye(found["codes"].shape[1], dtype=torch.bfloat16)
        theirs = found["layer"](x).T.float()
        expected = decoded(artifact, found["name"]).float()
        assert (theirs - expected).norm() < 0.02 * expected.norm()


def comfyui_reads(path: Path, artifact: Artifact) -> None:
    """What ComfyUI's loader does with such a file: layers from the metadata, weight times scale."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        layers = json.loads(file.metadata()["_quantization_metadata"])["layers"]
        for layer in layers:
            weight, scale = file.get_tensor(f"{layer}.weight"), file.get_tensor(f"{layer}.weight_scale")
            assert torch.equal(weight.bfloat16() * scale.bfloat16(), decoded(artifact, f"{layer}.weight"))
    assert len(layers) == sum(u.codec.format == "fp8" for u in artifact.manifest.units.values())


def decoded(artifact: Artifact, name: str) -> torch.Tensor:
    return artifact.decode(artifact.manifest.unit_of[name])[name]


def run_shell(text: str, cli: Callable[..., tuple[int, str, str]]) -> None:
    """Runs the lines of a shell snippet; what is installed already is not installed again."""
    for line in text.strip().splitlines():
        program, *arguments = shlex.split(line)
        if program == "bagel-compress":
            code, _, err = cli(*arguments)
            assert code == 0, err
        elif program == "hf":
            command = Path(sys.executable).with_name("hf")
            subprocess.run([command if command.exists() else shutil.which("hf"), *arguments], check=True, timeout=120)
        else:
            assert line in ("pip install bagel-compress", "pip install 'bagel-compress[onnx]'")


def run_python(snippet: Snippet, artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    names: dict[str, object] = {}
    if snippet.title == "Official BAGEL code":
        sys.path.append(str(Path(__file__).parents[1] / "pipeline"))
        from official_standin import provide

        provide(monkeypatch, artifact)
    if snippet.title == "dfloat11":
        sys.path.append(str(Path(__file__).parents[1] / "codecs"))
        from dfloat11_official import package
        from test_df11_loader import official_model

        package()
        names["model"] = official_model(fill=False)
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        exec(compile(snippet.text, snippet.title, "exec"), names)
    if snippet.title == "dfloat11":
        x = torch.linspace(-2, 2, 8).bfloat16()
        assert torch.equal(names["model"](x), official_model()(x))  # type: ignore[operator]
    elif snippet.title == "Official BAGEL code":
        assert Path("teapot.png").exists()
    elif snippet.title != "ComfyUI":
        assert shown.getvalue().strip()
    return names


def test_command_lines_are_understood(built: Callable[[str], Artifact]) -> None:
    """Fast, for those that run for minutes: every verb, option and packaged target on a card exists."""
    from bagel_compress.cli import command_parser
    from bagel_compress.run.target import Target

    lines = [line for s in snippets(built("int8-24gb"), "ann/x") if s.language == "sh" for line in s.text.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("bagel-compress")]
    assert {command[0] for command in commands} == {"generate", "comfyui", "export", "ask"}
    for command in commands:
        parsed = command_parser().parse_args(command)
        if command[0] == "export":
            assert Target.load(parsed.target).export is not None


def test_all_snippets_of_all_recipes_are_covered(built: Callable[[str], Artifact]) -> None:
    """A snippet that is offered for a shipped recipe and not run above would be a promise nobody checked."""
    ran = {title for _, title in CASES + SLOW}
    for recipe in ("nf4", "int8-24gb", "fp8-24gb", "mixed-16gb", "mixed-24gb", "df11", "raw", "fp8-comfyui"):
        assert {s.title for s in snippets(built(recipe), "ann/x")} <= ran
