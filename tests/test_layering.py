"""Import directions, and what a bare start of the command line may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Low to high; a module may import from its own level's modules and from lower levels, never from higher ones.
LEVELS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "spec", "limits"}),
    frozenset({"tensorfile", "words", "codecs", "metrics", "lpips", "clip", "sizes", "resources", "download", "case"}),
    frozenset({"calibrate", "recipe", "runtime", "target", "checkpoint", "lora", "header", "reports", "synth_kernel"}),
    frozenset({"plan", "artifact", "writer", "readers", "build", "synth", "hub", "devices"}),
    frozenset({"load", "stream", "trace", "observe", "comfy", "residency"}),
    frozenset({"export", "content"}),
    frozenset({"validate", "report_html", "report_budgets", "report_svg", "report_text", "report_family"}),
    frozenset({"publish", "card", "snippets", "provenance"}),
    frozenset({"cli", "pytest_plugin", "__main__"}),
)
HEAVY = {"torch", "numba", "bitsandbytes", "onnx", "onnxruntime", "tensorrt_rtx", "triton", "huggingface_hub"}
OPTIONAL = (HEAVY - {"torch", "numba"}) | {
    "flash_attn", "ray", "tensorrt", "compressed_tensors", "dfloat11", "pytest",
}  # fmt: skip


def level(module: str) -> int:
    for height, names in enumerate(LEVELS):
        if module in names:
            return height
    pytest.fail(f"bagel_compress.{module} has no level; put it into LEVELS where it belongs")


def imported(file: Path) -> list[tuple[str, bool]]:
    """(module, at import time) for every import of a file; imports under TYPE_CHECKING are left out."""
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                found.extend((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                found.append((child.module, top))
                found.extend((f"{child.module}.{alias.name}", top) for alias in child.names)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            visit(child, top and not inside)

    visit(ast.parse(file.read_text(encoding="utf-8")), True)
    return found


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("file", files("bagel"), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_model_knows_nothing_of_the_toolkit(file: Path) -> None:
    assert [m for m, _ in imported(file) if m.split(".")[0] == "bagel_compress"] == []


def test_only_nano_knows_nano() -> None:
    outside = [f for f in files("bagel") if "nano" not in f.parts]
    assert [f for f in outside for m, _ in imported(f) if m.startswith("bagel.nano")] == []


@pytest.mark.parametrize("file", files("bagel_compress"), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(file: Path) -> None:
    own = file.relative_to(ROOT / "bagel_compress").parts[0].removesuffix(".py")
    if own in ("__init__", "data"):
        return
    for module, _ in imported(file):
        parts = module.split(".")
        if parts[0] == "bagel_compress" and len(parts) > 1 and parts[1] != own:
            assert level(parts[1]) <= level(own), f"{own} imports {parts[1]}, which is above it"


def test_codecs_and_metrics_do_not_know_the_model() -> None:
    low = [*files("bagel_compress/codecs"), ROOT / "bagel_compress" / "metrics.py"]
    assert [f.name for f in low for m, _ in imported(f) if m.split(".")[0] == "bagel"] == []


def test_plans_are_made_without_heavy_packages() -> None:
    modules = ["recipe", "plan", "header", "checkpoint", "codecs", "artifact", "target", "case", "reports"]
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
        "cli._parser()\n"
        f"print(sorted(m for m in {sorted(HEAVY | {'numpy', 'pydantic', 'PIL'})!r} if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_is_quick() -> None:
    """Processor time from the interpreter's start to the end of --help: what an idle machine would wait."""
    code = (
        "import atexit, sys, time; atexit.register(lambda: print(time.process_time(), file=sys.stderr))\n"
        "from bagel_compress.cli import main; main(['--help'])"
    )
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr) for _ in range(3)
    ]
    assert min(times) < 0.5


def test_opening_a_model_draws_no_initial_values() -> None:
    """On the meta device torch would load its compiler for them, which takes longer than opening an artifact."""
    code = (
        "import sys, torch\nfrom bagel_compress.load import open_model\n"
        f"open_model({str(ROOT / 'tests/data/golden/checkpoint')!r})\n"
        "print([m for m in ('torch._dynamo', 'sympy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
