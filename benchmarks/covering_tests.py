"""Which tests execute a line: the tests run once under coverage, in a fork. Used by mutants.py."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

OPTIONS = ("-q", "-p", "no:cacheprovider", "-p", "no:randomly")  # of pytest
TICK = 0.02  # seconds between two looks at a child
LOOK = 50  # ticks between two looks at how much processor time it took
PATIENCE = 4  # times as many seconds as processor seconds
Lines = dict[str, dict[int, list[str]]]  # file -> line -> tests; line 0 has the tests of the whole file


def covered(work: Path, tests: Iterable[str]) -> tuple[Lines, dict[str, float]]:
    """Tests of each line, and seconds of each test. Raises SystemExit if a test fails before anything is changed."""
    lines: Lines = {}
    seconds: dict[str, float] = {}
    for name in tests:
        file = work / f"{name.replace('/', '-')}.json"
        if not file.exists():
            code = forked(lambda name=name, file=file: _cover(name, file), work / "log", 3600)  # type: ignore[misc]
            if code != 0 or not file.exists():
                raise SystemExit(f"{name} does not pass as it is ({code}):\n{(work / 'log').read_text()[-3000:]}")
        known = json.loads(file.read_text(encoding="utf-8"))
        seconds |= known["seconds"]
        for path, rows in known["lines"].items():
            for row, nodes in rows.items():
                lines.setdefault(path, {}).setdefault(int(row), []).extend(nodes)
    return lines, seconds


def _cover(name: str, file: Path) -> int:
    """In a fork: runs tests under coverage and writes what they execute. Tests that fail are left out, and said."""
    import pytest
    from coverage import CoverageData

    class Times:
        """Processor seconds, so that a pause or a busy machine does not count."""

        def __init__(self) -> None:
            self.seconds: dict[str, float] = {}
            self.failed: set[str] = set()
            self.begun = 0.0

        def pytest_runtest_logstart(self) -> None:
            self.begun = time.process_time()

        def pytest_runtest_logfinish(self, nodeid: str) -> None:
            self.seconds[nodeid] = time.process_time() - self.begun

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed or report.skipped:
                self.failed.add(report.nodeid)

    data = file.with_suffix(".coverage")
    os.environ["COVERAGE_FILE"] = str(data)
    measured = ("--cov=bagel", "--cov=bagel_compress", "--cov-context=test", "--cov-report=")
    code = pytest.main([*OPTIONS, *measured, name], plugins=[times := Times()])
    if code not in (0, 1):
        return int(code)
    found = CoverageData(str(data))
    found.read()
    lines: dict[str, dict[int, list[str]]] = {}
    for path in found.measured_files():
        rows = {
            row: sorted({node for c in contexts if (node := c.split("|")[0]) in times.seconds} - times.failed)
            for row, contexts in found.contexts_by_lineno(path).items()
        }
        lines[os.path.relpath(path)] = rows | {0: sorted({node for nodes in rows.values() for node in nodes})}
    print("left out, they fail or are skipped:", *sorted(times.failed), sep="\n  ")
    file.write_text(json.dumps({"seconds": times.seconds, "lines": lines, "left_out": sorted(times.failed)}))
    return 0


def forked(work: Callable[[], int], log: Path, limit: float) -> int | None:
    """The exit code of `work` in a child; None if it was killed.

    That is after `limit` processor seconds, or after PATIENCE times as many seconds of any kind, so that a child that
    only waits ends too. A pause does not count; a busy machine does once it gives the child less than 1/PATIENCE.
    """
    child = os.fork()
    if child == 0:
        code = 70
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            code = work()
        finally:
            sys.stdout.flush()
            os._exit(code)
    for tick in range(int(PATIENCE * limit / TICK)):
        time.sleep(TICK)
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if tick % LOOK == 0 and sum(map(_busy, _tree(child))) > limit:
            break
    for process in _tree(child):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _busy(process: int) -> float:
    """Processor seconds of a process and of its children that have ended; 0 once it is gone."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _tree(process: int) -> list[int]:
    """The process and all that it started and that still run."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        children = []
    return [process, *(found for child in children for found in _tree(int(child)))]
