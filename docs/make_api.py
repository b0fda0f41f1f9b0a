"""Writes the reference part of docs/api.md from the docstrings of the public API.

    python docs/make_api.py

What stands above the heading "## Reference" is written by hand and kept. A test compares the page with the docstrings.
"""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path

import bagel_compress as bc

PAGE = Path(__file__).with_name("api.md")
HEADING = "## Reference\n"
METHODS = {  # public methods and properties that a class is used by, in the order of use
    "Artifact": ("open", "verify", "units", "decode", "parts"),
    "Checkpoint": ("open", "read", "digest"),
    "Recipe": ("load", "parse", "digest"),
    "Target": ("load", "limit"),
}
ORDER = (
    "open_model", "Checkpoint", "Recipe", "make_plan", "compress", "Artifact", "trace", "validate", "budget", "Target",
    "export", "publish", "BagelCompressError",
)  # fmt: skip


def page() -> str:
    """The whole page as it should be."""
    by_hand = PAGE.read_text(encoding="utf-8").partition(HEADING)[0]
    return by_hand + HEADING + "".join(f"\n{section(name)}" for name in ORDER)


def section(name: str) -> str:
    """One public name: its signature, its docstring and, of a class, its methods."""
    value = getattr(bc, name)
    parts = [f"### bc.{name}\n", block(value, f"bc.{name}"), "\n", text(value)]
    for method in METHODS.get(name, ()):
        member = inspect.getattr_static(value, method)
        call = getattr(value, method) if callable(getattr(value, method)) else None
        about = getattr(member, "func", member)  # cached_property
        parts += ["\n", block(call, f"bc.{name}.{method}") if call else f"    {name}.{method}\n", "\n", text(about)]
    return "".join(parts)


def block(value: object, name: str) -> str:
    """The signature as an indented line; a class is shown by its name, since it is opened and not constructed."""
    if inspect.isclass(value):
        return f"    class {name}\n"
    signature = inspect.signature(value)  # type: ignore[arg-type]
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values() if p.name != "self"]
    shown = str(signature.replace(parameters=parameters, return_annotation=signature.empty))
    returned = str(signature.return_annotation).rpartition(".")[2] if signature.return_annotation else ""
    line = f"{name}{shown}" + (f" -> {returned}" if returned else "")
    return "".join(f"    {part}\n" for part in textwrap.wrap(line, 112, subsequent_indent="    "))


def text(value: object) -> str:
    """The docstring."""
    found = inspect.getdoc(value)
    if not found:
        raise SystemExit(f"{value!r} has no docstring; every public name and method needs one.")
    return found + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
