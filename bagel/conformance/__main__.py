"""The command line of the conformance check; the package's docstring says what is compared and how."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bagel.conformance.compare import LIMITS, ScenarioResult, check
from bagel.errors import BagelError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bagel.conformance",
        description="Replays golden traces of the official code and prints the error of each scenario.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="golden folder with manifest.json")
    parser.add_argument("--dtype", choices=sorted(LIMITS), default="fp32", help="which recording to replay (fp32)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args(argv)
    try:
        rows = check(args.folder, args.dtype)
    except BagelError as problem:
        print(f"bagel.conformance: {problem}", file=sys.stderr)
        return problem.exit_code
    passed = all(row.ok for row in rows)
    print(json.dumps({"ok": passed, "scenarios": [asdict(r) for r in rows]}, indent=2) if args.json else table(rows))
    return 0 if passed else 1


def table(rows: Sequence[ScenarioResult]) -> str:
    lines = [f"{'scenario':<20} {'tensors':>7} {'worst':>9} {'limit':>8}  ok   tensor"]
    for row in rows:
        verdict = "ok" if row.ok else "FAIL"
        note = f"  ({row.note})" if row.note else ""
        lines.append(
            f"{row.scenario:<20} {row.tensors:>7} {row.error:>9.1e} {row.limit:>8.0e}  {verdict:<4} {row.tensor}{note}"
        )
    lines.append(f"{sum(r.ok for r in rows)} of {len(rows)} scenarios within their limits")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
