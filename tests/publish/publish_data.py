"""What the publishing tests share: a token that must never be seen, and reports that fit an artifact."""

from __future__ import annotations

from pathlib import Path

from bagel_compress.build.artifact import Artifact
from bagel_compress.parity.report_data import BudgetReport, CaseParity, ParityReport, PhaseUse, Row, Timing
from bagel_compress.publishing.publishable import Publishable, label, source_of

TOKEN = "hf_plantedtokenXYZ0123456789abcdef"
REPO = "ann/BAGEL-7B-MoT-NF4"
BASE = "ByteDance-Seed/BAGEL-7B-MoT"
CARD = "rtx4070-12gb"  # the target that the artifacts of these tests promise


HERE = {"device": "cpu (x86_64)", "dtype": "bfloat16", "torch": "2.13"}


def parity(
    artifact: Publishable, digest: str | None = None, ok: bool = True, environment: dict[str, str] = HERE
) -> ParityReport:
    """A report about this build (or, with `digest`, about another one)."""
    value = 0.11 if ok else 0.31
    row = Row(case="t2i_square", metric="latent.path", value=value, floor=0.004, limit=0.2, source="ours", ok=ok)
    psnr = Row(case="", metric="image.psnr", value=24.5, floor=48.0, limit=20.0, source="ours", ok=True)
    return ParityReport(
        artifact=digest or artifact.digest,
        name=label(artifact),
        level="4-bit",
        source=source_of(artifact).name,
        source_digest=source_of(artifact).digest,
        environment=environment,
        rows=(row, psnr),
        cases=(
            CaseParity(
                name="t2i_square", kind="t2i", prompt="a red | cat", metrics={"latent.path": value}, has_image=True
            ),
        ),
        notes=("LPIPS was not measured.",),
    )


def budget(artifact: Artifact, digest: str | None = None, target: str = CARD, ok: bool = True) -> BudgetReport:
    """A budget report; not `ok`: over its limit."""
    return BudgetReport(
        artifact=digest or artifact.digest,
        name=artifact.manifest.recipe.name,
        target=target,
        device="NVIDIA GeForce RTX 4070",
        limit=11.2 * 2**30,
        phases=(
            PhaseUse(name="prefill", parts={"weights": 8.0 * 2**30, "activations": 0.5 * 2**30}),
            PhaseUse(name="denoise", parts={"weights": 8.0 * 2**30, "activations": 0.7 * 2**30}, measured=8.9 * 2**30),
        ),
        timings=(Timing(what="denoise step", median=0.41, p90=0.44, reference=0.52),),
        measured_on="NVIDIA GeForce RTX 4070",
        timed_on="NVIDIA GeForce RTX 4070",
        overruns=() if ok else ("denoise needs 12.40 GiB, the target has 11.20 GiB.",),
    )


def write_reports(artifact: Artifact) -> Artifact:
    """Reports that let the artifact be published, and the pictures that validation draws."""
    from PIL import Image

    parity(artifact).save(artifact.path)
    budget(artifact).save(artifact.path)
    Image.linear_gradient("L").resize((96, 32)).convert("RGB").save(artifact.path / "reports" / "t2i_square.png")
    (artifact.path / "report.html").write_text("<html></html>")
    return artifact


def flip(path: Path, at: int = -1) -> None:
    """Changes one byte of a file in place."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.unlink()  # never through a link
    path.write_bytes(data)
