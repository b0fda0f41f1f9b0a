"""pytest plugin: adds the limits of an artifact as tests, one per limit, to a project's own tests.

    pytest --bagel-artifact out/nf4 --bagel-trace bagel.trace.safetensors [--bagel-target 12gb]

Without --bagel-artifact the plugin does nothing and imports neither torch nor the toolkit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from bagel_compress.parity.report_data import BudgetReport, ParityReport


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options."""
    group = parser.getgroup("bagel-compress", "parity and budget of a compressed BAGEL")
    group.addoption("--bagel-artifact", metavar="DIR", help="artifact to compare with its reference")
    group.addoption("--bagel-trace", metavar="FILE", nargs="+", default=[], help="traces of the artifact's source")
    group.addoption("--bagel-target", metavar="T", nargs="+", default=[], help="targets that it has to fit")
    group.addoption("--bagel-device", metavar="D", default="cpu", help="device to run on (cpu)")


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Adds one test per limit in front of the collected ones."""
    artifact = config.getoption("--bagel-artifact")
    if artifact is None:
        return
    if not config.getoption("--bagel-trace"):
        raise pytest.UsageError("--bagel-artifact needs --bagel-trace FILE: traces of the artifact's source.")
    items[:0] = list(_tests(session, config, Path(artifact)))


def _tests(session: pytest.Session, config: pytest.Config, artifact: Path) -> Iterator[pytest.Item]:
    from bagel_compress.errors import BagelCompressError
    from bagel_compress.validation.check import check

    options = (
        config.getoption("--bagel-trace"),
        config.getoption("--bagel-target"),
        config.getoption("--bagel-device"),
    )
    try:
        report, budgets = check(artifact, *options)
    except BagelCompressError as error:
        raise pytest.UsageError(str(error)) from None
    for name, failure in _verdicts(report, budgets):
        yield _Verdict.from_parent(session, name=name, failure=failure)


def _verdicts(report: ParityReport, budgets: list[BudgetReport]) -> Iterator[tuple[str, str]]:
    """Yields the name of each test and why it fails, empty if it passes."""
    from bagel_compress.parity.report_data import sentence

    for row in report.rows:
        yield f"bagel::{row.metric}[{row.case or 'all'}]", "" if row.ok else sentence(row)
    yield "bagel::faults", " ".join(report.faults)
    for budget in budgets:
        yield f"bagel::memory[{budget.target}]", " ".join(budget.broken)


class _Verdict(pytest.Item):
    """A test whose outcome is already known. `failure` says why it fails; it is empty if the test passes."""

    def __init__(self, *, failure: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._failure = failure

    def runtest(self) -> None:
        if self._failure:
            pytest.fail(self._failure, pytrace=False)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, self.name
