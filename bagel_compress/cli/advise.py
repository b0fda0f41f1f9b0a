"""The verb advise: what to take for a GPU."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bagel_compress.cli import add_json, add_verb, emit, say

if TYPE_CHECKING:
    from bagel_compress.budgets.advise import Machine
    from bagel_compress.run.target import Target


def register(verbs: Any) -> None:
    """Adds the parser of advise."""
    parser = add_verb(
        verbs, "advise", "what to take for a GPU: recipes that fit, from the best on, and the commands to type",
        "bagel-compress advise\n  bagel-compress advise --target 12gb\n"
        "  bagel-compress advise --target 12gb 12gb --json",
    )  # fmt: skip
    parser.add_argument(
        "--target", nargs="+", metavar="T",
        help="target file or packaged name; several: GPUs of one machine (default: the GPUs that are found here)",
    )  # fmt: skip
    parser.add_argument("--source", metavar="SRC", help="where the weights come from (default: the released model)")
    parser.add_argument(
        "--builds", type=Path, default=Path("out"), metavar="DIR", help="folder whose artifacts are ranked too (out)"
    )
    parser.add_argument("--count", type=int, default=6, metavar="N", help="rows at most (%(default)s)")
    add_json(parser)
    parser.set_defaults(verb=_advise)


def _advise(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from bagel_compress.budgets.advise import advice_table, advise
    from bagel_compress.errors import TargetError
    from bagel_compress.run.target import Target
    from bagel_compress.source.released_header import REPO

    if args.count < 1:
        raise TargetError(f"--count is {args.count}, expected at least 1.")
    machine = _machine()
    targets = [Target.load(name) for name in args.target] if args.target else _found(machine)
    builds = sorted(path for path in args.builds.glob("*/") if path.is_dir())
    choices = advise(targets, source=args.source or REPO, builds=builds, count=args.count, say=say)
    data = {
        "targets": [target.name for target in targets],
        "machine": asdict(machine),
        "choices": [choice.to_json() for choice in choices],
    }
    emit(args, data, advice_table(choices, machine))
    return 0


def _machine() -> Machine:
    import os
    import shutil

    import torch

    from bagel_compress.budgets.advise import Machine

    memory = None
    if hasattr(os, "sysconf"):  # not on Windows
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = tuple(torch.cuda.get_device_name(index) for index in range(count))
    return Machine(shutil.disk_usage(Path.cwd()).free, memory, names)


def _found(machine: Machine) -> list[Target]:
    """A target for each GPU here: the packaged one of its memory, or the next smaller. Raises TargetError."""
    import torch

    from bagel_compress.budgets.promises import packaged_targets
    from bagel_compress.errors import TargetError

    known = [t for t in packaged_targets().values() if t.export is None and t.residency is None]
    names = ", ".join(sorted(packaged_targets()))
    if not machine.gpus:
        raise TargetError(f"no CUDA device was found here; name the GPU with --target, one of {names}.")
    found = []
    for index, name in enumerate(machine.gpus):
        memory = torch.cuda.get_device_properties(index).total_memory
        # torch counts a little less than nvidia-smi, which the targets quote
        fitting = [t for t in known if t.device.memory_mib * 2**20 <= memory * 1.03]
        eight = packaged_targets()["8gb"]
        if not fitting and eight.device.memory_mib * 2**20 <= memory * 1.03:
            fitting = [eight]
        if not fitting:
            raise TargetError(f"{name} has {memory / 2**30:.1f} GiB; the smallest packaged target is 8gb.")
        found.append(max(fitting, key=lambda t: (t.limit, -len(t.name))))
    return found
