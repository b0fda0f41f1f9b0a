"""The command line: thin verbs. The only place that prints, reads the environment or exits.

Verbs live in the group modules beside this file. A group registers its parsers without importing torch; what a verb
needs is imported inside the verb. Exit codes: 0 done, 1 a gate did not pass, 2 wrong usage or input.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from bagel.errors import BagelError
from bagel_compress.errors import BagelCompressError

GROUPS = (
    "advise", "app", "build", "comfyui", "calibrate", "allocate", "fit", "sample", "validate", "evaluate", "speed",
    "profile",
    "publish", "export", "demo", "nano", "finetune",
)  # fmt: skip
# Verbs that can be resumed.
GOES_ON = ("compress", "run", "export", "calibrate", "batch", "train-nano", "allocate", "finetune")
WORD = 300  # characters of a word in a message; names in files have no end


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script. Returns the exit code."""
    _open_standard_files()
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = command_parser()
    if not argv:
        parser.print_help()
        return 0
    if not argv[0].startswith("-") and argv[0] not in (verbs := _verbs(parser)):
        close = difflib.get_close_matches(argv[0], verbs, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"verbs are {', '.join(verbs)}."
        say(printable(f"bagel-compress: there is no verb {argv[0]!r}; {hint}"))
        return 2
    args = parser.parse_args(argv)
    try:
        code: int = args.verb(args)
        sys.stdout.flush()
    except (BagelCompressError, BagelError) as error:
        say(printable(f"bagel-compress: {error}"))
        return error.exit_code
    except BrokenPipeError:  # the reader of our output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # what no verb expected of a file: a name too long, a disk that failed
        say(printable(f"bagel-compress: {error.filename or 'the output'}: {error.strerror or error}."))
        return 2
    except KeyboardInterrupt:
        hint = "; the same command goes on from there" if argv[0] in GOES_ON else ""
        say(f"bagel-compress: interrupted{hint}.")
        return 130
    return code


def _open_standard_files() -> None:
    """Where the caller closed one (`>&-`), the next file that is opened, a shard say, would be written to as output."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 - as long as the process


def printable(text: str) -> str:
    """Text from files on one line of a terminal: control characters are shown, not obeyed, and long words are cut."""
    visible = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    words = (word if len(word) <= WORD else f"{word[:WORD]}..." for word in visible.split(" "))
    return " ".join(words)


def emit(args: argparse.Namespace, data: Mapping[str, Any], text: str) -> None:
    """Prints `data` as one JSON document with --json, `text` otherwise."""
    print(json.dumps(data, indent=2) if args.json else text)


def add_verb(verbs: Any, name: str, text: str, examples: str) -> argparse.ArgumentParser:
    """A verb's parser: `text` is its line in the list of verbs and its description; examples stand below the help."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=f"examples:\n  {examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    return parser


def say(message: str) -> None:
    """A line about what is being done, on stderr. Nobody may be there to read it: that ends no work."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def _verbs(parser: argparse.ArgumentParser) -> list[str]:
    """Names of the verbs."""
    return next(list(a.choices) for a in parser._actions if isinstance(a, argparse._SubParsersAction))


def command_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bagel-compress",
        description="Compress, validate and publish BAGEL checkpoints.",
        epilog="examples:\n  bagel-compress demo\n  bagel-compress plan recipes/nf4.yaml --source BAGEL-7B-MoT\n"
        "  bagel-compress run recipes/nf4.yaml --source BAGEL-7B-MoT --out out/nf4",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bagel-compress {version('bagel-compress')}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for group in GROUPS:
        importlib.import_module(f"bagel_compress.cli.{group}").register(verbs)
    return parser


if __name__ == "__main__":
    sys.exit(main())
