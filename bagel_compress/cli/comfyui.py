"""The verb comfyui: installs the nodes into ComfyUI, or writes an artifact as one file for ComfyUI's own loaders."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bagel_compress.cli import add_json, add_verb, emit

INSTALL = "install"


def register(verbs: Any) -> None:
    """Adds this group's parser to `verbs` (an argparse sub-parsers action)."""
    comfyui = add_verb(
        verbs, "comfyui", "install the nodes into ComfyUI, or write an artifact as one file that its loaders open",
        "bagel-compress comfyui install ComfyUI\n"
        "  bagel-compress comfyui out/fp8-comfyui --out BAGEL-7B-MoT_fp8_e4m3fn_scaled.safetensors\n"
        "  bagel-compress comfyui out/df11 --bf16 --out BAGEL-7B-MoT_bf16.safetensors",
    )  # fmt: skip
    comfyui.usage = "bagel-compress comfyui install DIR\n       bagel-compress comfyui ARTIFACT --out FILE [--bf16]"
    comfyui.add_argument(
        "arguments", nargs="+", metavar="install DIR | ARTIFACT",
        help="install: nodes and example workflows for the ComfyUI in DIR; otherwise the folder of an artifact",
    )  # fmt: skip
    comfyui.add_argument("--out", metavar="FILE", help="file to write")
    comfyui.add_argument(
        "--bf16", action="store_true", help="decode every weight: a bf16 file, which ComfyUI-BAGEL's nodes open too"
    )
    add_json(comfyui)
    comfyui.set_defaults(verb=_comfyui)


def _comfyui(args: argparse.Namespace) -> int:
    from bagel_compress.errors import InputError

    if args.arguments[0] == INSTALL and len(args.arguments) == 2 and args.out is None:
        return _install(args, Path(args.arguments[1]))
    if len(args.arguments) != 1 or args.arguments[0] == INSTALL or args.out is None:
        raise InputError("comfyui takes either `install DIR` (ComfyUI's folder) or `ARTIFACT --out FILE`.")
    from bagel_compress.build.artifact import Artifact
    from bagel_compress.build.comfyui_file import comfyui_file

    nbytes = comfyui_file(Artifact.open(args.arguments[0]), Path(args.out), args.bf16)
    emit(args, {"path": args.out, "bytes": nbytes}, f"{args.out}: {nbytes:,} bytes")
    return 0


def _install(args: argparse.Namespace, comfyui: Path) -> int:
    from bagel_compress.comfyui.install import install

    folder = install(comfyui)
    text = (
        f"{folder}: the nodes are in the menu BAGEL after ComfyUI starts again; example workflows under Templates."
        " Models go into models/bagel, one folder each."
    )
    emit(args, {"path": str(folder)}, text)
    return 0
