"""Import directions, and what a bare start of the command line may load."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Packages of bagel_compress from low to high: a module imports from its own package and from lower ones. The table in
# docs/architecture.md is this list.
PACKAGES = (
    "errors", "io", "codecs", "source", "calibrate", "build", "run", "interop", "parity", "budgets", "scores", "report",
    "nano_training", "finetune", "exporting", "evaluate", "validation", "publishing", "api", "app", "comfyui", "cli",
    "__main__",
)  # fmt: skip
HEAVY = {"torch", "numba", "bitsandbytes", "onnx", "onnxruntime", "tensorrt_rtx", "triton", "huggingface_hub"}
OPTIONAL = (HEAVY - {"torch", "numba"}) | {
    "flash_attn", "ray", "lmms_eval", "pyarrow", "transformers", "tensorrt", "compressed_tensors", "dfloat11", "pytest",
    "gradio", "playwright",
}  # fmt: skip


def height(package: str) -> int:
    if package not in PACKAGES:
        pytest.fail(f"bagel_compress.{package} has no place; put it into PACKAGES where it belongs")
    return PACKAGES.index(package)


def climbing(own: str, source: str) -> list[str]:
    """Modules that a source text of the package `own` imports from higher packages, under TYPE_CHECKING too."""
    names = [m.split(".") for m, _ in imported(source, type_checking=True)]
    foreign = [n for n in names if n[0] == "bagel_compress" and len(n) > 1 and n[1] != own]
    return [".".join(n) for n in foreign if height(n[1]) > height(own)]


def imported(source: str, type_checking: bool = False) -> list[tuple[str, bool]]:
    """(module, at import time) for every import of a source text; with those under TYPE_CHECKING only if asked."""
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if not type_checking and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                found.extend((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                found.append((child.module, top))
                found.extend((f"{child.module}.{alias.name}", top) for alias in child.names)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            visit(child, top and not inside)

    visit(ast.parse(source), True)
    return found


def text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("file", files("bagel"), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_model_knows_nothing_of_the_toolkit(file: Path) -> None:
    assert [m for m, _ in imported(text(file)) if m.split(".")[0] == "bagel_compress"] == []


def test_only_nano_knows_nano() -> None:
    outside = [f for f in files("bagel") if "nano" not in f.parts]
    assert [f for f in outside for m, _ in imported(text(f)) if m.startswith("bagel.nano")] == []


@pytest.mark.parametrize("file", files("bagel_compress"), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(file: Path) -> None:
    own = file.relative_to(ROOT / "bagel_compress").parts[0].removesuffix(".py")
    if own not in ("__init__", "data"):
        assert climbing(own, text(file)) == []


@pytest.mark.parametrize("guard", ["", "if TYPE_CHECKING:\n    ", "def late() -> None:\n    "])
def test_an_upward_import_is_found(guard: str) -> None:
    assert climbing("io", guard + "from bagel_compress.cli import main") == [
        "bagel_compress.cli",
        "bagel_compress.cli.main",
    ]


def test_the_architecture_page_shows_the_same_packages() -> None:
    section = text(ROOT / "docs" / "architecture.md").partition("## The toolkit\n")[2].partition("\n## ")[0]
    listed = re.findall(r"^    (\w+) ", section, re.M)
    there = {p.stem for p in (ROOT / "bagel_compress").iterdir()} - {"__main__"}
    assert listed == [package for package in PACKAGES if package in there]


def test_codecs_and_metrics_do_not_know_the_model() -> None:
    low = [*files("bagel_compress/codecs"), ROOT / "bagel_compress" / "parity" / "metrics.py"]
    assert [f.name for f in low for m, _ in imported(text(f)) if m.split(".")[0] == "bagel"] == []


def test_plans_are_made_without_heavy_packages() -> None:
    modules = [
        "build.recipe", "build.plan", "build.artifact", "codecs", "source.released_header", "source.checkpoint",
        "run.target", "run.case", "parity.report_data",
    ]  # fmt: skip
    code = (
        f"import sys, importlib\nfor m in {modules!r}: importlib.import_module('bagel_compress.' + m)\n"
        f"print(sorted(m for m in {sorted(HEAVY)!r} if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_module_imports_without_the_optional_packages() -> None:
    """All but the Triton kernel and the pytest plugin, which only those packages import."""
    code = (
        f"import sys, importlib, pkgutil\nfor m in {sorted(OPTIONAL)!r}: sys.modules[m] = None\n"
        "import bagel, bagel_compress\n"
        "for package in (bagel, bagel_compress):\n"
        "    for m in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        if m.name.rpartition('.')[2] not in ('__main__', 'triton_kernel', 'pytest_plugin'):\n"
        "            importlib.import_module(m.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr.splitlines()[-1]


def test_the_command_line_starts_without_torch() -> None:
    code = (
        "import sys; sys.argv = ['bagel-compress']\n"
        "import bagel_compress.cli as cli\n"
        "cli.command_parser()\n"
        f"print(sorted(m for m in {sorted(HEAVY | {'numpy', 'pydantic', 'PIL'})!r} if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_loads_nothing_that_is_slow_to_load() -> None:
    """Help is printed before anything is read, so what it waits for are imports."""
    slow = sorted(HEAVY | OPTIONAL | {"numpy", "pydantic", "PIL", "yaml", "tokenizers", "safetensors", "tqdm"})
    code = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print([m for m in {slow!r} if m in sys.modules], file=sys.stderr))\n"
        "from bagel_compress.cli import main; main(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"
    assert "generate" in done.stdout


def test_opening_a_model_draws_no_initial_values() -> None:
    """On the meta device torch would load its compiler for them, which takes longer than opening an artifact."""
    code = (
        "import sys, torch\nfrom bagel_compress.run.load import open_model\n"
        f"open_model({str(ROOT / 'tests/data/golden/checkpoint')!r})\n"
        "print([m for m in ('torch._dynamo', 'sympy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
