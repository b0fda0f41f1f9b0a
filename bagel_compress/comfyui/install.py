"""install: the stub in ComfyUI's `custom_nodes` by which it finds the nodes, and example workflows beside it."""

from __future__ import annotations

from pathlib import Path

from bagel_compress.errors import InputError
from bagel_compress.io.atomic import write_atomic
from bagel_compress.io.packaged import resource

FOLDER = "bagel-compress"
STUB = '''"""Nodes of bagel-compress; written by `bagel-compress comfyui install`."""

import sys

try:
    from bagel_compress.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
except ModuleNotFoundError as error:
    if error.name != "bagel_compress":
        raise
    raise ModuleNotFoundError(
        f"bagel-compress is not installed in the Python that runs ComfyUI; run `{sys.executable} -m pip install"
        " bagel-compress`."
    ) from None

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
'''


def install(comfyui: Path) -> Path:
    """Writes the stub and the workflows; an older one is replaced. `comfyui`: ComfyUI's folder, or its custom_nodes.

    Returns the folder that was written. Raises InputError if it is neither.
    """
    nodes = comfyui if comfyui.name == "custom_nodes" else comfyui / "custom_nodes"
    if not nodes.is_dir():
        raise InputError(f"{comfyui} has no folder custom_nodes; give the folder in which ComfyUI's main.py lies.")
    folder = nodes / FOLDER
    workflows = sorted((resource("exports") / "comfyui").glob("*.json"))
    for file in workflows:
        write_atomic(folder / "example_workflows" / file.name, file.read_bytes())
    write_atomic(folder / "__init__.py", STUB)  # last: ComfyUI loads a folder by it
    return folder
