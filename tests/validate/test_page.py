"""The page in a real browser, where one is installed: no console errors, nothing fetched, no sideways scrolling."""

import re
import shutil
import subprocess

import pytest
from tiny_suite import CASES, PICTURES, TINY

from bagel_compress.build.compress import compress
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.parity.record import record_cases
from bagel_compress.source.checkpoint import Checkpoint
from bagel_compress.validation.artifact import validate_artifact

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
RECIPE = """
name: nf4
rules:
  - match: {component: llm, kind: linear}
    codec: nf4
  - match: {}
    codec: raw
limits: {class: 4-bit}
"""
PROBE = """<iframe id=f src="file://%s" style="width:390px;height:9000px;border:0"></iframe><pre id=out></pre><script>
f.onload = () => { const d = f.contentDocument, images = [...d.images];
  out.textContent = JSON.stringify({images: images.length, broken: images.filter(i => !i.naturalWidth).length,
    wide: d.documentElement.scrollWidth, charts: d.querySelectorAll("svg polyline").length}); };
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_the_page_in_a_browser(reference, tmp_path):
    checkpoint = Checkpoint.open(TINY)
    artifact = compress(make_plan(checkpoint, Recipe.parse(RECIPE, "nf4")), checkpoint, tmp_path / "nf4")
    suite = [(c, PICTURES) for c in CASES]
    trace = record_cases(reference, checkpoint.name, checkpoint.digest, suite, tmp_path / "t.safetensors", ("repeat",))
    validate_artifact(artifact.path, [trace.path], TINY)
    (tmp_path / "probe.html").write_text(PROBE % (artifact.path / "report.html"))
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        "--enable-logging=stderr", "--virtual-time-budget=5000", "--window-size=500,9100", "--dump-dom", f"file://{tmp_path}/probe.html",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"\{.images.*?\}", done.stdout.replace("&quot;", '"'))
    assert found, done.stdout[-500:]
    assert '"images":9,"broken":0' in found[0]
    assert int(re.search(r'"wide":(\d+)', found[0])[1]) <= 390
    assert int(re.search(r'"charts":(\d+)', found[0])[1]) > 10
    assert "CONSOLE" not in done.stderr
