"""A build of the true shape stays in bounded anonymous memory. Slow: writes 7 GB."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bagel_compress.source.synthetic import synthesise

BENCH = Path(__file__).parents[2] / "benchmarks" / "bench_build.py"
LIMIT_MB = 1500


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is read from /proc")
def test_anonymous_memory_of_a_true_shape_build(tmp_path: Path) -> None:
    """One decoder layer has the largest tensors already: embedding and head of 1.09 GB each."""
    synthesise("7b-mot", tmp_path / "source", seed=0, layers=1)
    for codec in ("nf4 double_quant", "df11"):
        (tmp_path / codec).mkdir()
        command = [sys.executable, str(BENCH), "--child", codec, str(tmp_path / "source"), str(tmp_path / codec)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert json.loads(done.stdout.splitlines()[-1])["rss_anon_mb"] < LIMIT_MB
