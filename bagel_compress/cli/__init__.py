"""The command line. Only this package prints, reads environment variables or exits.

The commands ("verbs") are in group modules, which register their argparse parsers. A verb imports what it needs inside
its function, so that `--help` is fast and needs no torch. Exit codes: 0 done, 1 a check did not pass, 2 wrong usage or
input.
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
from bagel_compress.cli.interrupt import safe_interrupts
from bagel_compress.errors import BagelCompressError

GROUPS = (
    "advise", "app", "build", "comfyui", "calibrate", "allocate", "fit", "sample", "validate", "evaluate", "speed",
    "profile",
    "publish", "export", "demo", "nano", "finetune",
)  # fmt: skip
# Verbs that continue an interrupted run.
RESUMABLE = (
    "compress", "run", "export", "calibrate", "batch", "train-nano", "allocate", "finetune", "trace", "evaluate",
)  # fmt: skip
LONGEST_WORD = 300  # characters; longer words in messages are cut, since names in damaged files can have any length


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of the console script. Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with safe_interrupts():
            return _run(words)
    except KeyboardInterrupt:
        hint = "; the same command continues from there" if words and words[0] in RESUMABLE else ""
        say(f"bagel-compress: interrupted{hint}.")
        return 130


def _run(words: list[str]) -> int:
    """Parses the words and runs their verb. Returns the exit code; raises KeyboardInterrupt on Ctrl-C."""
    _open_standard_files()
    parser = command_parser()
    if not words:
        parser.print_help()
        return 0
    if not words[0].startswith("-") and words[0] not in (verbs := _verbs(parser)):
        close = difflib.get_close_matches(words[0], verbs, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"verbs are {', '.join(verbs)}."
        say(printable(f"bagel-compress: there is no verb {words[0]!r}; {hint}"))
        return 2
    args = parser.parse_args(words)
    try:
        code: int = args.verb(args)
        sys.stdout.flush()
    except (BagelCompressError, BagelError) as error:
        say(printable(f"bagel-compress: {error}"))
        return error.exit_code
    except BrokenPipeError:  # the reader of the output (head, less) has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # file errors that the verb does not handle: a name too long, a failing disk
        say(printable(f"bagel-compress: {error.filename or 'the output'}: {error.strerror or error}."))
        return 2
    return code


def _open_standard_files() -> None:
    """Opens stdin, stdout and stderr on the null device if the caller closed them (`>&-`).

    Otherwise the next opened file, such as a shard, would get the number of stdout, and messages be printed into it.
    """
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
    """Untrusted text for one line of a terminal: control characters are escaped, and long words are cut."""
    visible = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    words = (word if len(word) <= LONGEST_WORD else f"{word[:LONGEST_WORD]}..." for word in visible.split(" "))
    return " ".join(words)


def emit(args: argparse.Namespace, data: Mapping[str, Any], text: str) -> None:
    """Prints `data` as one JSON document with --json, `text` otherwise."""
    print(json.dumps(data, indent=2) if args.json else text)


def add_verb(verbs: Any, name: str, text: str, examples: str) -> argparse.ArgumentParser:
    """Adds the parser of a verb. `text` is its line in the list of verbs and its description; examples end the help."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=f"examples:\n  {examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    return parser


def say(message: str) -> None:
    """Prints a progress message on stderr. If stderr cannot be written to, the message is dropped."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Adds the option --trust, which `trusts` reads."""
    parser.add_argument(
        "--trust", action="store_true",
        help="open a build sooner: do not compare its bytes with its manifest (`verify` does that once)",
    )  # fmt: skip


def trusts(args: argparse.Namespace, model: str) -> bool:
    """The value of --trust; says on stderr what it means for this model."""
    if args.trust:
        say(f"{model}: its bytes are not compared with its manifest (--trust)")
    return bool(args.trust)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds the option --json."""
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def _verbs(parser: argparse.ArgumentParser) -> list[str]:
    """The names of the verbs of a parser."""
    return next(list(a.choices) for a in parser._actions if isinstance(a, argparse._SubParsersAction))


def command_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
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
