"""The verb advise: recommends recipes and builds for a GPU."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bagel_compress.cli import add_json, add_verb, emit, say


def register(verbs: Any) -> None:
    """Adds the parser of advise."""
    parser = add_verb(
        verbs, "advise", "recommend recipes that fit a GPU, the best first, with the commands to use them",
        "bagel-compress advise\n  bagel-compress advise --target 12gb\n"
        "  bagel-compress advise --target 12gb 12gb --json\n"
        "  bagel-compress advise --target 24gb --builds out you/BAGEL-7B-MoT-NF4",
    )  # fmt: skip
    parser.add_argument(
        "--target", nargs="+", metavar="T",
        help="target file or packaged name; several: GPUs of one machine (default: the GPUs of this machine)",
    )  # fmt: skip
    parser.add_argument("--source", metavar="SRC", help="where the weights come from (default: the released model)")
    parser.add_argument(
        "--builds", nargs="+", metavar="DIR|REPO",
        help="finished builds to rank too: folders, folders of builds, Hub ids (default: those in the folder out)",
    )  # fmt: skip
    parser.add_argument("--count", type=int, default=6, metavar="N", help="rows at most (%(default)s)")
    add_json(parser)
    parser.set_defaults(verb=_advise)


def _advise(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from bagel_compress.budgets.advise import advice_table, advise
    from bagel_compress.budgets.known_builds import known_builds
    from bagel_compress.budgets.machine import Machine, found_targets
    from bagel_compress.errors import TargetError
    from bagel_compress.run.target import Target
    from bagel_compress.source.released_header import REPO

    if args.count < 1:
        raise TargetError(f"--count is {args.count}, expected at least 1.")
    machine = Machine.found()
    targets = [Target.load(name) for name in args.target] if args.target else found_targets(machine)
    local = [path.parent for path in Path("out").glob("*/manifest.json")]
    builds = known_builds(sorted(local) if args.builds is None else args.builds, say)
    choices = advise(
        targets, source=args.source or REPO, builds=builds, count=args.count,
        on_candidate=lambda name: say(f"predicting the peak of {name}"),
    )  # fmt: skip
    data = {
        "targets": [target.name for target in targets],
        "machine": asdict(machine),
        "choices": [choice.to_json() for choice in choices],
    }
    emit(args, data, advice_table(choices, machine))
    return 0
