"""What the publishing tests share: a token that must never be seen, and reports that fit an artifact."""

from __future__ import annotations

import io
from pathlib import Path

from blake3 import blake3

from bagel_compress.budgets.overruns import overruns
from bagel_compress.build.artifact import Artifact
from bagel_compress.build.limits import resolve
from bagel_compress.exporting.manifest import ExportFolder
from bagel_compress.parity.report_data import BudgetReport, CaseParity, ParityReport, PhaseUse, Timing
from bagel_compress.parity.verdict import MODULE_METRICS, make_rows
from bagel_compress.publishing.publishable import Publishable, label, recipe_of, source_of

TOKEN = "hf_plantedtokenXYZ0123456789abcdef"
REPO = "ann/BAGEL-7B-MoT-NF4"
BASE = "ByteDance-Seed/BAGEL-7B-MoT"
CARD = "rtx4070-12gb"  # the target that the artifacts of these tests promise


HERE = {"device": "cpu (x86_64)", "dtype": "bfloat16", "torch": "2.13"}


VALUES = {"image.psnr": 24.5, "latent.path": 0.11}  # what the card's table shows; other limits hold at their value


def parity(
    artifact: Publishable, digest: str | None = None, ok: bool = True, environment: dict[str, str] = HERE
) -> ParityReport:
    """A report about this build (or, with `digest`, about another one) that covers all that its class asks for."""
    is_export = isinstance(artifact, ExportFolder)
    level = artifact.manifest.level if is_export else artifact.manifest.recipe.limits.level
    limits = resolve(level, (recipe_of(artifact) or artifact.manifest).limits.overrides)
    values = {m: limit.value for m, limit in limits.items()} | {
        m: v for m, v in VALUES.items() if m in limits and limits[m].holds(v)
    }
    values |= {} if ok else {"latent.path": 0.31}
    probes = {} if is_export else {m: values.pop(m) for m in MODULE_METRICS if m in values}
    has_image = (artifact.path / "reports" / "t2i_square.png").is_file()
    floor = {"latent.path": {"kernel": 0.004}, "image.psnr": {"kernel": 48.0}}
    cases = tuple(
        CaseParity(name=name, kind=kind, prompt=prompt, metrics=values if image else {}, floor=floor,
                   has_image=image and has_image)
        for name, kind, prompt, image in (
            ("t2i_square", "t2i", "a red | cat", True), ("edit", "edit", "", False),
            ("understand", "understand", "", False), ("think", "think + t2i", "", False),
        )
    )  # fmt: skip
    rows = make_rows(limits, level, cases, probes)
    return ParityReport(
        artifact=digest or artifact.digest,
        name=label(artifact),
        level=level,
        source=source_of(artifact).name,
        source_digest=source_of(artifact).digest,
        environment=environment,
        rows=rows,
        cases=cases,
        pictures={"t2i_square": blake3(picture()).hexdigest()} if has_image else {},
        notes=("LPIPS was not measured.",),
    )


def picture() -> bytes:
    """A PNG file like the one that validation draws of a case."""
    from PIL import Image

    data = io.BytesIO()
    Image.linear_gradient("L").resize((96, 32)).convert("RGB").save(data, "PNG")
    return data.getvalue()


def budget(artifact: Artifact, digest: str | None = None, target: str = CARD, ok: bool = True) -> BudgetReport:
    """A budget report; not `ok`: over its limit."""
    report = BudgetReport(
        artifact=digest or artifact.digest,
        name=artifact.manifest.recipe.name,
        target=target,
        device="NVIDIA GeForce RTX 4070",
        limit=(11.2 if ok else 8.8) * 2**30,
        phases=(
            PhaseUse(name="prefill", parts={"weights": 8.0 * 2**30, "activations": 0.5 * 2**30}),
            PhaseUse(name="denoise", parts={"weights": 8.0 * 2**30, "activations": 0.7 * 2**30}, measured=8.9 * 2**30),
        ),
        timings=(Timing(what="denoise step", median=0.41, p90=0.44, reference=0.52),),
        measured_on="NVIDIA GeForce RTX 4070",
        timed_on="NVIDIA GeForce RTX 4070",
    )
    return report.model_copy(update={"overruns": overruns(report, None)})


def write_reports(artifact: Artifact) -> Artifact:
    """Reports that let the artifact be published, and the pictures that validation draws."""
    budget(artifact).save(artifact.path)
    (artifact.path / "reports" / "t2i_square.png").write_bytes(picture())
    parity(artifact).save(artifact.path)
    (artifact.path / "report.html").write_text("<html></html>")
    return artifact


def flip(path: Path, at: int = -1) -> None:
    """Changes one byte of a file in place."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.unlink()  # never through a link
    path.write_bytes(data)
