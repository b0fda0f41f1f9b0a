"""Kernels that work with addresses keep their own arrays alive."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import bagel_compress.codecs

MODULES = sorted(
    path
    for path in Path(bagel_compress.codecs.__file__).parent.rglob("*.py")
    if "address_of(" in path.read_text("utf-8")
)
MAKERS = {"empty", "zeros", "ones", "full"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_kernel_is_left_with_the_address_of_an_array_that_was_freed(path: Path) -> None:
    """numba frees an array that a kernel made after its last use as an array, whatever is done with its address."""
    lost = [
        f"{function.name}: {name}"
        for function in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(function, ast.FunctionDef)
        for name in _own_arrays(function)
        if not _stays(function, name)
    ]
    assert not lost


def test_the_check_finds_one() -> None:
    text = "def {}(n):\n    a = np.empty(1, np.uint8)\n    at = address_of(a)\n    store8(at, n)\n{}"
    bad, good = (ast.parse(text.format(*filled)).body[0] for filled in (("bad", ""), ("good", "    return a[0]\n")))
    assert isinstance(bad, ast.FunctionDef)
    assert isinstance(good, ast.FunctionDef)
    assert _own_arrays(bad) == _own_arrays(good) == ["a"]
    assert not _stays(bad, "a")
    assert _stays(good, "a")


def _own_arrays(function: ast.FunctionDef) -> list[str]:
    """Names of arrays that a function makes."""
    found = []
    for node in ast.walk(function):
        if not isinstance(node, ast.Assign) or len(node.targets) != 1:
            continue
        target, value = node.targets[0], node.value
        names = target.elts if isinstance(target, ast.Tuple) else [target]
        values = value.elts if isinstance(value, ast.Tuple) else [value]
        for name, made in zip(names, values, strict=False):
            if (
                isinstance(name, ast.Name)
                and isinstance(made, ast.Call)
                and isinstance(made.func, ast.Attribute)
                and made.func.attr in MAKERS
            ):
                found.append(name.id)
    return found


def _stays(function: ast.FunctionDef, name: str) -> bool:
    """Whether an array whose address is taken is used behind that line too, or in a loop, or not by address at all."""
    taken, used = 0, 0
    for node in ast.walk(function):
        if isinstance(node, ast.For | ast.While):
            if any(_is(part, name) for part in ast.walk(node)):
                return True
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "address_of":
            if any(_is(part, name) for part in ast.walk(node)):
                taken = node.lineno
        elif _is(node, name):
            used = max(used, node.lineno)
    return not taken or used > taken


def _is(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load)
