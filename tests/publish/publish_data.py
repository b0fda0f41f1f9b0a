"""What the publishing tests share: a token that must never be seen, and reports that fit an artifact."""

from __future__ import annotations

from pathlib import Path

from bagel_compress.artifact import Artifact
from bagel_compress.reports import CaseParity, ParityReport, Row

TOKEN = "hf_plantedtokenXYZ0123456789abcdef"
REPO = "ann/BAGEL-7B-MoT-NF4"
BASE = "ByteDance-Seed/BAGEL-7B-MoT"


def parity(artifact: Artifact, digest: str | None = None, ok: bool = True) -> ParityReport:
    """A report about this artifact (or, with `digest`, about another one)."""
    value = 0.11 if ok else 0.31
    row = Row(case="t2i_square", metric="velocity.rel_l2", value=value, floor=0.004, limit=0.2, source="ours", ok=ok)
    psnr = Row(case="", metric="image.psnr", value=24.5, floor=48.0, limit=20.0, source="ours", ok=True)
    return ParityReport(
        artifact=digest or artifact.digest,
        name=artifact.manifest.recipe.name,
        level="4-bit",
        source=artifact.manifest.source.name,
        source_digest=artifact.manifest.source.digest,
        environment={"device": "cpu (x86_64)", "dtype": "bfloat16", "torch": "2.13"},
        rows=(row, psnr),
        cases=(CaseParity(name="t2i_square", kind="t2i", prompt="a red | cat", metrics={"velocity.rel_l2": value}),),
        notes=("LPIPS was not measured.",),
    )


def write_reports(artifact: Artifact) -> Artifact:
    """Reports that let the artifact be published."""
    from PIL import Image

    parity(artifact).save(artifact.path)
    pictures = artifact.path / "reports" / "pictures"
    pictures.mkdir(exist_ok=True)
    Image.linear_gradient("L").resize((96, 32)).convert("RGB").save(pictures / "t2i_square.png")
    return artifact


def flip(path: Path, at: int = -1) -> None:
    """Changes one byte of a file in place."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.unlink()  # never through a link
    path.write_bytes(data)
