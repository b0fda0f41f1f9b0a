"""The public API: what the import loads, what it offers, its page, its examples, and a foreign package `bagel`."""

from __future__ import annotations

import inspect
import logging
import os
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest

import bagel_compress as bc
from bagel.errors import BagelError
from bagel_compress import errors

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
NANO = str(ROOT / "bagel_compress" / "data" / "BAGEL-nano")
HEAVY = ("torch", "numpy", "numba", "pydantic", "PIL", "huggingface_hub", "onnx", "onnxruntime")


def python(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT]))}
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False, env=env)


def test_the_import_alone_loads_nothing_large() -> None:
    done = python(
        "import sys, bagel_compress as bc\n"
        "bc.__version__, bc.open_model, bc.trace, bc.validate, bc.budget, bc.export, bc.publish, dir(bc)\n"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_every_public_name_is_there_and_no_module_has_its_name() -> None:
    assert set(bc.__all__) <= set(dir(bc))
    for name in bc.__all__:
        assert not isinstance(getattr(bc, name), types.ModuleType)
    modules = {path.stem for path in Path(bc.__file__).parent.iterdir()} - {"__init__"}
    assert modules.isdisjoint(bc.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        bc.nothing  # noqa: B018


@pytest.mark.parametrize("name", sorted(set(bc.__all__) - {"__version__", "BagelCompressError"}))
def test_every_public_name_says_what_it_raises_and_shows_three_lines(name: str) -> None:
    text = inspect.getdoc(getattr(bc, name)) or ""
    assert "Raises" in text
    assert len([line for line in text.splitlines() if line.startswith("    ")]) == 3
    assert "bc." in text


def test_all_errors_have_one_root() -> None:
    found = [v for v in vars(errors).values() if inspect.isclass(v) and issubclass(v, Exception)]
    assert len(found) > 10
    assert all(issubclass(error, BagelError) for error in found)
    assert all(issubclass(error, bc.BagelCompressError) for error in found if error is not BagelError)


def test_the_page_says_what_the_docstrings_say() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_api.py"))["page"]()
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == made, "run python docs/make_api.py"


def test_another_projects_bagel_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "bagel").mkdir()
    (tmp_path / "bagel" / "__init__.py").write_text("class Client: ...\n")
    (tmp_path / "bagel_other-1.0.dist-info").mkdir()
    (tmp_path / "bagel_other-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: bagel-other\n")
    (tmp_path / "bagel_other-1.0.dist-info" / "top_level.txt").write_text("bagel\n")
    done = python("import bagel_compress", tmp_path)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith("ImportError: the package `bagel` (")
    assert "is another project's" in last
    assert "`pip uninstall bagel-other`, then `pip install --force-reinstall --no-deps bagel-compress`" in last


def test_a_bagel_that_cannot_be_imported_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "bagel.py").write_text("import a_package_that_is_not_there\n")
    done = python("import bagel_compress", tmp_path)
    assert "ImportError: the package `bagel` cannot be imported, but" in done.stderr.splitlines()[-1]


def example(name: str, *arguments: str) -> None:
    runpy.run_path(str(EXAMPLES / name))["main"](*arguments)


def test_the_examples_build_draw_and_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "bagel_compress")
    example("compress_a_fine_tune.py", NANO, "nf4", str(tmp_path / "nf4"))
    assert "every byte as its manifest says" in capsys.readouterr().out
    assert f"building nf4 of local in {tmp_path / 'nf4'}" in caplog.messages
    assert {record.name.partition(".")[0] for record in caplog.records} == {"bagel_compress"}
    example("draw_with_a_build.py", str(tmp_path / "nf4"), "a red circle", "32", str(tmp_path / "a.png"), "cpu", "4")
    assert "32 x 32 pixels; the model sees: " in capsys.readouterr().out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    example("write_an_own_recipe.py", NANO, str(tmp_path / "mine"))
    assert "(did you mean gen?)" in capsys.readouterr().out
    assert {group.codec for group in bc.Artifact.open(tmp_path / "mine").groups()} == {"raw", "nf4", "fp8"}


def test_a_budget_takes_objects_as_well_as_names(tmp_path: Path) -> None:
    text = (
        "name: card\ndevice: {name: x, memory_mib: 512}\ntasks: [understand]\n"
        "sizes: {image: [32, 32], input_image: [32, 32], answer_tokens: 4}\n"
    )
    (tmp_path / "card.yaml").write_text(text)
    target = bc.Target.load(tmp_path / "card.yaml")
    by_object = bc.budget(bc.Recipe.load("nf4"), target, source=NANO)
    by_name = bc.budget("nf4", tmp_path / "card.yaml", source=NANO)
    assert by_object == by_name
    assert by_object.peak > 500 * 2**20  # bytes: the CUDA context alone is 500 MiB


def test_the_example_of_a_test_suite_passes() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "validate_in_a_test_suite.py"]
    done = subprocess.run(
        command, cwd=EXAMPLES, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout
