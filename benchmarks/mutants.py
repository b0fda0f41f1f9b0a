"""Which one-operator changes of a module do its tests notice? A mutation run with cosmic-ray, in a copy of the tree.

    python benchmarks/mutants.py bagel/settings.py tests/bagel/test_settings.py [--count 40] [--seed 0] [--seconds 120]

A random sample of all changes is made one at a time, and each is judged by the given tests. What survives is printed as
a diff: either a test is missing, or the change is none that anything could notice. Exit 1 if fewer than `--least`
percent were noticed. Needs the extra `dev`.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = (".git", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", "out", "__pycache__")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", help="file to change, such as bagel/settings.py")
    parser.add_argument("tests", nargs="+", help="tests that judge the changes")
    parser.add_argument("--count", type=int, default=40, help="changes to try (40)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (0)")
    parser.add_argument("--seconds", type=float, default=120, help="after which a run counts as noticed (120)")
    parser.add_argument("--least", type=float, default=95, help="percent that must be noticed (95)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mutants-") as place:
        tree = Path(place) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*LEFT_OUT))
        (tree / "mutants.toml").write_text(_config(args), encoding="utf-8")
        _run(tree, "init", "mutants.toml", "session.sqlite")
        tried = _sample(tree / "session.sqlite", args.count, args.seed)
        _run(tree, "baseline", "mutants.toml")  # the tests pass as they are
        _run(tree, "exec", "mutants.toml", "session.sqlite")
        survivors = _survivors(tree / "session.sqlite")
    for where, diff in survivors:
        print(f"{where}\n{diff}\n")
    noticed = 100 * (tried - len(survivors)) / max(1, tried)
    print(f"{args.module}: {tried - len(survivors)} of {tried} changes noticed ({noticed:.1f} %)")
    return 0 if noticed >= args.least else 1


def _config(args: argparse.Namespace) -> str:
    tests = " ".join([sys.executable, "-m pytest -x -q -p no:cacheprovider", *args.tests])
    return (
        f'[cosmic-ray]\nmodule-path = "{args.module}"\ntimeout = {args.seconds}\nexcluded-modules = []\n'
        f'test-command = "{tests}"\n[cosmic-ray.distributor]\nname = "local"\n'
    )


def _run(tree: Path, *arguments: str) -> None:
    program = Path(sys.executable).with_name("cosmic-ray")
    done = subprocess.run([program, *arguments], cwd=tree, env=_environment(tree), capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"cosmic-ray {arguments[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def _environment(tree: Path) -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}


def _sample(session: Path, count: int, seed: int) -> int:
    """Leaves `count` random changes in the session. Returns how many there are."""
    with sqlite3.connect(session) as base:
        jobs = sorted(row[0] for row in base.execute("SELECT job_id FROM work_items"))
        kept = set(random.Random(seed).sample(jobs, min(count, len(jobs))))
        for job in set(jobs) - kept:
            base.execute("DELETE FROM mutation_specs WHERE job_id = ?", (job,))
            base.execute("DELETE FROM work_items WHERE job_id = ?", (job,))
    return len(kept)


def _survivors(session: Path) -> list[tuple[str, str]]:
    """Place and diff of every change that no test noticed."""
    query = (
        "SELECT m.module_path, m.start_pos_row, m.operator_name, r.diff FROM work_results r"
        " JOIN mutation_specs m ON m.job_id = r.job_id WHERE r.test_outcome = 'SURVIVED' ORDER BY 1, 2"
    )
    with sqlite3.connect(session) as base:
        return [(f"{path}:{row} {name}", str(diff)) for path, row, name, diff in base.execute(query)]


if __name__ == "__main__":
    sys.exit(main())
