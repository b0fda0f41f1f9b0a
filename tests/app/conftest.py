"""The page over BAGEL-nano and a build of it, served once for all tests."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bagel_compress.cli import main

ROOT = Path(__file__).parents[2]
NANO = ROOT / "bagel_compress" / "data" / "BAGEL-nano"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@dataclass(frozen=True)
class Server:
    url: str
    build: Path


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("gradio", reason="the page needs the extra `app`")
    folder = tmp_path_factory.mktemp("app")
    build = folder / "int8"
    assert main(["compress", "int8-24gb", "--source", str(NANO), "--out", str(build)]) == 0
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    code = "import sys; from bagel_compress.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "app", str(NANO), str(build), "--port", str(port)]
    temporary = folder / "tmp"
    temporary.mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    log = folder / "log"
    begun = time.monotonic()
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as process:
        url = f"http://127.0.0.1:{port}/"
        while not _answers(url):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < begun + 180, log.read_text()
            time.sleep(0.2)
        yield Server(url, build)
        process.terminate()
        assert process.wait(30) == 0, log.read_text()
    assert list(temporary.glob("bagel-app-*")) == []  # uploads and pictures are gone


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.fixture(scope="session")
def launched() -> Callable[[Any], AbstractContextManager[str]]:
    """Serves a page from this process: page -> a context that is its address."""
    return _launched


@contextmanager
def _launched(page: Any) -> Iterator[str]:
    """A page (gradio.Blocks) served by this process: its address."""
    from bagel_compress.app.controls import CSS, theme

    _, url, _ = page.launch(
        server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, show_error=True, footer_links=[], css=CSS,
        ssr_mode=False, theme=theme(), enable_monitoring=False, mcp_server=False, pwa=False,
    )  # fmt: skip
    try:
        yield url
    finally:
        page.close(verbose=False)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: install the package `chromium`")
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()
