"""Which one-operator changes of the program do its tests notice? A random sample, in a copy of the tree.

    python benchmarks/mutants.py bagel bagel_compress/codecs [--tests tests/bagel tests/codecs] [--count 300] [--seed 0]

The changes are cosmic-ray's; all changes of all the modules are one list, so that a module is drawn as often as it has
changes. First each folder of tests runs once under coverage, which tells the tests that execute a line. Then each
change is judged by the tests of its line, the fastest first, up to the first that fails: in a fork of this process,
which holds torch and numba but no module of the program. Lines that run only at import, and compiled kernels, are
judged by the tests of their module or of the modules that name it; kernels first by those of the files named after
them, which may run them in a process of their own. A test that fails has to pass again without the change, or it is
left out, and the others judge. A change of nothing but the annotations of a function, which nobody evaluates, is not
in the list. What survives is printed as a diff: either a test is missing, or the change is none that anything could
notice. Exit 1 if fewer than `--least` percent were noticed.

With `--work` what is known of the tests and of the changes stays in that folder, and a later run goes on there. Needs
the extra `dev` and fork: Linux.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import contextlib
import difflib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import cache_from_source
from pathlib import Path

from covering_tests import OPTIONS, Lines, covered, forked

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = (".git", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", "out", "__pycache__")
WARM = ["torch", "numba", "numpy", "pytest", "pytest_cov", "xdist", "hypothesis", "pydantic", "safetensors.torch"]
SLACK = 60  # processor seconds that a change may take beyond five times what its tests take without it
MANY = 40  # tests of a line, above which those of the file named after the module come first
MISUSE = (4, 5)  # pytest's exit codes when a named test is gone; its file is then run as it is


@dataclass(frozen=True)
class Change:
    module: str
    operator: str
    occurrence: int
    row: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="+", help="files or folders to change, such as bagel/settings.py")
    parser.add_argument("--tests", nargs="+", default=["tests"], help="test files or folders that judge (tests)")
    parser.add_argument("--count", type=int, default=40, help="changes to try (40)")
    parser.add_argument("--skip", type=int, default=0, help="changes of the sample that another process tries (0)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (0)")
    parser.add_argument(
        "--most", type=float, default=150, help="processor seconds of tests that judge one change (150)"
    )
    parser.add_argument("--least", type=float, default=95, help="percent that must be noticed (95)")
    parser.add_argument("--work", type=Path, help="folder that keeps the copy, the coverage and the results")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a change is taken back
    with tempfile.TemporaryDirectory(prefix="mutants-") as place:
        work = args.work or Path(place)
        tree = work / "tree"
        if not tree.exists():
            shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*LEFT_OUT))
            compileall.compile_dir(tree, quiet=1)
        _warm(tree)
        lines, seconds = covered(work, args.tests)
        sample = _sample(tree, args.modules, args.count, args.seed)[args.skip :]
        results = _tried(work, sample, lines, seconds, args.most)
    survivors = [r for r in results if not r["noticed"]]
    for found in survivors:
        print(f"{found['module']}:{found['row']} {found['operator']} ({found['tests']} tests)\n{found['diff']}\n")
    noticed, late = len(results) - len(survivors), sum(r["how"] == "time" for r in results)
    percent = 100 * noticed / max(1, len(results))
    print(f"{noticed} of {len(results)} changes noticed ({percent:.1f} %), {late} of them by running too long")
    return 0 if percent >= args.least else 1


def _warm(tree: Path) -> None:
    """Imports what every run of the tests needs, but no module that may be changed, and makes `tree` the program."""
    os.chdir(tree)
    sys.path[:] = [str(tree), *(p for p in sys.path if p and Path(p).resolve() not in (ROOT, Path(__file__).parent))]
    os.environ |= {
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
        "NUMBA_CACHE_DIR": str(tree.parent / "numba"),
    }
    sys.dont_write_bytecode = True
    for name in WARM:
        with contextlib.suppress(ImportError):
            __import__(name)
    loaded = [name for name in sys.modules if name.split(".")[0] in ("bagel", "bagel_compress")]
    assert not loaded, f"{loaded[0]} was imported before it could be changed"


def _sample(tree: Path, modules: Iterable[str], count: int, seed: int) -> list[Change]:
    """`count` random ones of all changes of the modules, in random order: a part of the sample is a sample."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    kinds = {n: kind() for n in operator_names() if not (kind := get_operator(n)).arguments() and n != "core/NoOp"}
    paths = {p for m in modules for p in ([tree / m] if m.endswith(".py") else sorted((tree / m).rglob("*.py")))}
    changes: list[Change] = []
    for path in sorted(paths):
        nodes = list(ast_nodes(get_ast(path.read_text(encoding="utf-8"))))
        for name, operator in kinds.items():
            starts = [start for node in nodes for start, _ in operator.mutation_positions(node)]
            changes += [Change(str(path.relative_to(tree)), name, i, start[0]) for i, start in enumerate(starts)]
    drawn = random.Random(seed).sample(changes, len(changes))
    kept: list[Change] = []
    for change in drawn:
        if len(kept) == count:
            break
        before, after = _versions(tree, change)
        if after is not None and _meaning(before) != _meaning(after):
            kept.append(change)
    return kept


def _versions(tree: Path, change: Change) -> tuple[str, str | None]:
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    before = (tree / change.module).read_text(encoding="utf-8")
    return before, mutate_code(before, get_operator(change.operator)(), change.occurrence)


def _meaning(text: str) -> str:
    """The syntax tree without the annotations of functions' arguments, results and local variables."""
    try:
        parsed = ast.parse(text)
    except SyntaxError:
        return ""
    for function in ast.walk(parsed):
        for node in ast.walk(function) if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) else ():
            if isinstance(node, ast.arg | ast.AnnAssign):
                node.annotation = ast.Constant(None)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                node.returns = None
    return ast.dump(parsed)


def _tried(work: Path, sample: list[Change], lines: Lines, seconds: dict[str, float], most: float) -> list[dict]:
    """The result of each change; a line of results.jsonl each."""
    log = work / "results.jsonl"
    known = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(r["module"], r["operator"], r["occurrence"]): r for r in known}
    results = []
    for number, change in enumerate(sample, 1):
        key = (change.module, change.operator, change.occurrence)
        if key not in done:
            done[key] = _judge(work, change, _tests(work / "tree", change, lines, seconds, most), seconds)
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[key]) + "\n")
        results.append(done[key])
        told = {k: done[key][k] for k in ("module", "row", "operator", "how", "seconds", "tests")}
        print(f"{number}/{len(sample)}", *told.values(), file=sys.stderr, flush=True)
    return results


def _tests(tree: Path, change: Change, lines: Lines, seconds: dict[str, float], most: float) -> list[str]:
    """Tests that execute the changed line, else its module, else the modules that name it: the fastest first."""
    rows, path = lines.get(change.module, {}), Path(change.module)
    stem = path.parent.name if path.stem == "__init__" else path.stem
    text = (tree / path).read_text(encoding="utf-8")
    begun = max((row for row in rows if row <= change.row), default=0)  # where a statement of several lines begins
    found = set(rows.get(begun) or ())
    if not found or not _in_function(text, change.row):  # a line of the module ran for the test that imported it first
        found = set(rows.get(0, ()))
    if not found or _compiled(change, text):
        users = [other for other in lines if stem in (tree / other).read_text(encoding="utf-8")]
        found |= {node for other in users for node in lines[other].get(0, ())}
    own: tuple[str, ...] = (f"test_{stem}.py",)
    if _compiled(change, text):  # its tests may run in a process of their own
        own = (f"_{path.parent.name}", f"_{stem.split('_')[0]}")
        found |= {node for node in seconds if any(name in node.split("::")[0] for name in own)}
    kept: list[str] = []
    total = 0.0
    far = {node for node in found if not any(name in node.split("::")[0] for name in own) and len(found) > MANY}
    for node in sorted(found, key=lambda node: (node in far, seconds[node], node)):
        total += seconds[node]
        if total <= most or not kept:
            kept.append(node)
    return kept


def _compiled(change: Change, text: str) -> bool:
    """Is the module's code compiled by numba or Triton, where coverage sees no line?"""
    return "numba" in text or "triton" in text or "/kernels/" in change.module


def _in_function(text: str, row: int) -> bool:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    return any(isinstance(n, kinds) and n.lineno <= row <= (n.end_lineno or 0) for n in ast.walk(ast.parse(text)))


def _judge(work: Path, change: Change, tests: list[str], seconds: dict[str, float]) -> dict:
    """Makes a change, runs its tests in a fork and takes the change back, until what fails passes without it."""
    before, after = _versions(work / "tree", change)
    assert after is not None
    kernels = _compiled(change, before)
    start, left, how = time.monotonic(), list(tests), "survived"
    while left and how == "survived":
        limit = SLACK + 5 * sum(seconds[node] for node in left) + (120 if kernels else 0)
        with _changed(work / "tree" / change.module, before, after):
            code = forked(lambda: _run(work, left, kernels), work / "log", limit)  # noqa: B023 - called here
            if code in MISUSE:
                files = sorted({node.split("::")[0] for node in left})
                code = forked(lambda: _run(work, files, kernels), work / "log", limit)  # noqa: B023
        if code == 0:
            break
        failed = _failed(work)
        if code == 1 and failed and forked(lambda: _run(work, failed, kernels), work / "log", limit) != 0:  # noqa: B023
            left = [node for node in left if node not in failed]
            continue
        how = "time" if code is None else "test"
    diff = "\n".join(difflib.unified_diff(before.split("\n"), after.split("\n"), n=1, lineterm=""))
    told = {"noticed": how != "survived", "how": how, "tests": len(tests)}
    return asdict(change) | told | {"seconds": round(time.monotonic() - start, 1), "diff": diff}


@contextlib.contextmanager
def _changed(file: Path, before: str, after: str) -> Iterator[None]:
    """Inside, the file has another text. Its compiled form is told from its size and seconds alone, so it goes."""
    Path(cache_from_source(str(file))).unlink(missing_ok=True)
    try:
        file.write_text(after, encoding="utf-8")
        yield
    finally:
        file.write_text(before, encoding="utf-8")


def _failed(work: Path) -> list[str]:
    """The tests that failed in the last run."""
    file = work / "failed"
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def _run(work: Path, tests: list[str], kernels: bool) -> int:
    import numba
    import pytest

    if kernels:  # numba does not see that a kernel which another one calls has changed
        shutil.rmtree(work / "numba-changed", ignore_errors=True)
        os.environ["NUMBA_CACHE_DIR"] = numba.config.CACHE_DIR = str(work / "numba-changed")
    (work / "failed").unlink(missing_ok=True)

    class Failures:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                with (work / "failed").open("a", encoding="utf-8") as file:
                    file.write(report.nodeid + "\n")

    return int(pytest.main(["-x", *OPTIONS, *tests], plugins=[Failures()]))


if __name__ == "__main__":
    sys.exit(main())
