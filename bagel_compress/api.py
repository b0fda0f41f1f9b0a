"""The public functions of `import bagel_compress as bc` that span several packages.

They accept the same paths, names and Hub ids as the command line, and return objects where the command line prints.
Heavy packages are imported when a function is called. The other public names (Checkpoint, Recipe, make_plan, compress,
Artifact, Target) are defined in the packages they belong to.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from bagel.loops import Loops
    from bagel_compress.build.artifact import Artifact
    from bagel_compress.build.recipe import Recipe
    from bagel_compress.exporting.manifest import ExportFolder
    from bagel_compress.parity.report_data import BudgetReport, ParityReport
    from bagel_compress.parity.trace import TraceFile
    from bagel_compress.publishing.pipeline import PublishResult
    from bagel_compress.run.target import Target
    from bagel_compress.source.checkpoint import Checkpoint

log = logging.getLogger(__name__)


def open_model(
    model: str | Path,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    target: str | Path | Target | None = None,
    adapter: str | Path | None = None,
    trust: bool = False,
) -> Loops:
    """Opens a model, ready to sample: `run(turns, ...)` draws, edits or answers.

    `model` is the folder of a full-precision checkpoint, an artifact or an export, or a Hub id (`owner/name` or
    `owner/name@revision`) of one. `device` is "cpu", "cuda", "cuda:1", "auto", or several GPUs ("cuda:0,cuda:1") among
    which layers are divided. `dtype` None is bf16, the models' own; another torch dtype decodes an artifact's weights
    to it, which is slow and meant for comparisons. With `target`, parts of the model wait in host memory in the phases
    that the target defines. `adapter` is a folder of `finetune`; its LoRA is computed beside the linears of a model on
    one device. An export runs in its own precision on "cpu" or "cuda". What is read of an artifact or export is
    compared with its manifest's digests; with `trust` it is not, which opens a build sooner that was verified before.

    `run` takes texts and PIL pictures as turns, `size` (height, width) in pixels, multiples of 16, `seed`, `think`,
    `flow` and `text` settings; its result has `image` (PIL, RGB) or `text`.

    Raises CheckpointError, ArtifactError or HubError if the model cannot be opened, TargetError if the device does not
    exist, FinetuneError on an adapter that is not for this model, and ExportError or MissingExtraError if this machine
    cannot run an export.

        model = bc.open_model("out/nf4", device="cuda")
        model.run(["a red cat on a roof"], size=(1024, 1024), seed=7).image.save("cat.png")
        print(model.run([picture, "what is in the picture?"], output="text").text)
    """
    from bagel_compress.build.manifest import EXPORT_MANIFEST
    from bagel_compress.errors import FinetuneError
    from bagel_compress.io.safe_paths import exists
    from bagel_compress.run.load import downloaded

    folder = Path(model) if exists(model) else downloaded(str(model))
    log.info("opening %s on %s", model, device)
    if adapter is not None and (target is not None or "," in device or (folder / EXPORT_MANIFEST).is_file()):
        raise FinetuneError("an adapter runs beside a checkpoint or build on one device, without a target.")
    if (folder / EXPORT_MANIFEST).is_file():
        from bagel_compress.exporting.ort_sampler import open_onnx

        return open_onnx(folder, None if device == "auto" else device.partition(":")[0], trust=trust)
    from bagel_compress.budgets.device_option import choose_device, one_device
    from bagel_compress.run.load import open_model as load_model

    if target is not None:
        from bagel_compress.run.offload import place as placed
        from bagel_compress.run.target import Target

        sampler = load_model(folder, "cpu", dtype, trust=trust)
        placed(sampler, target if isinstance(target, Target) else Target.load(target), one_device(device))
        return sampler
    place = choose_device(device, folder, log.info) if dtype is None else one_device(device)
    opened = load_model(folder, place, dtype, trust=trust)
    if adapter is not None:
        from bagel_compress.finetune.lora import attach

        attach(opened.bagel, adapter)
    return opened


def trace(
    source: str | Path | Checkpoint,
    cases: Sequence[str | Path],
    out: str | Path,
    device: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> TraceFile:
    """Records a trace: runs of the full-precision model on some cases, with which builds are compared.

    `source` is the checkpoint (folder, Hub id or Checkpoint), `cases` are YAML files or folders of them, `out` is the
    safetensors file to write; the model runs in bf16 on `device`. Each case is run several times, to measure the
    model's noise floor. An interrupted recording is continued. `progress` is called with a message for each case.

    Raises CheckpointError or HubError on the source, TargetError on a case that this model cannot run, InputError on a
    picture that cannot be read.

        file = bc.trace("BAGEL-7B-MoT", ["exports/cases"], "bagel.trace.safetensors", device="cuda")
        print(file.path, list(file.header.cases))
        report = bc.validate("out/nf4", [file.path])
    """
    from bagel_compress.budgets.device_option import one_device
    from bagel_compress.run.case import load_cases
    from bagel_compress.validation.artifact import record_source

    found = load_cases(list(cases))
    return record_source(source, found, out, one_device(device), progress=progress or log.info)


def validate(
    build: str | Path | Artifact,
    traces: Sequence[str | Path],
    source: str | Path | Checkpoint | None = None,
    device: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> ParityReport:
    """Compares an artifact or export with traces of its source, applies the limits of its recipe, writes the reports.

    `build` is a folder (or an Artifact), `traces` are files that `trace` wrote. With `source`, the full-precision
    checkpoint, the errors of an artifact are attributed to its components. Writes reports/ and report.html into the
    folder. An export runs in its own runtime; `device` is then ignored.

    A broken limit raises no error: look at `passed` and `broken`, or call `require()`, which raises GateError. Raises
    TraceError on a trace of another source, RecipeError on a limit below the noise floor, ArtifactError on the build.

        report = bc.validate("out/nf4", ["bagel.trace.safetensors"], device="cuda")
        print(report.passed, report.broken)
        report.require()
    """
    from bagel_compress.build.manifest import EXPORT_MANIFEST

    folder, progress = _folder(build), progress or log.info
    if (folder / EXPORT_MANIFEST).is_file():
        from bagel_compress.exporting.manifest import ExportFolder
        from bagel_compress.validation.export import validate_export

        return validate_export(ExportFolder.open(folder), list(traces), progress=progress)
    from bagel_compress.budgets.device_option import one_device
    from bagel_compress.validation.artifact import validate_artifact

    return validate_artifact(folder, list(traces), source, one_device(device), progress)


def budget(
    build: str | Path | Artifact | Recipe,
    target: str | Path | Target,
    source: str | Path | None = None,
    device: str | None = None,
) -> BudgetReport:
    """Predicts the peak memory of a build on a target, phase by phase, in bytes; needs neither GPU nor weights.

    `build` is an artifact (then reports/budget-TARGET.json is written into its folder), or a recipe (object, file or
    packaged name) that is planned for `source`, by default the released checkpoint. `target` is a Target, a YAML file
    or a packaged name such as "12gb". With `device` ("cuda", "cuda:1") an artifact is also measured there, if that is
    the target's GPU; with "cpu" only times are measured, in seconds.

    A broken limit raises no error: see `broken` and `advice`. Raises RecipeError, PlanError, TargetError (an unknown
    target or size, a GPU that is not the target's), ArtifactError.

        report = bc.budget("nf4-12gb", "12gb")
        print(report.peak / 2**30, "GiB", report.broken, report.advice)
        bc.budget("out/nf4", "12gb", device="cuda")
    """
    from bagel_compress.build.recipe import Recipe
    from bagel_compress.validation.check import budgets_of

    chosen = build if isinstance(build, Recipe) else str(_folder(build))
    return budgets_of(chosen, [target], None if source is None else str(source), device)[0]


def export(
    source: str | Path | Artifact,
    target: str | Path | Target,
    out: str | Path,
    progress: Callable[[str, int, int], None] | None = None,
) -> ExportFolder:
    """Writes a checkpoint or artifact as ONNX graphs or TensorRT engines, one file per block, into the folder `out`.

    `target` (a Target, a YAML file or a packaged name such as "ort-cpu") defines the runtime, the precision and the
    sizes. An interrupted export is continued. `progress` is called with the name of a data file, and the numbers of
    data files done and in all.

    Raises ExportError if the target's settings are impossible, or `out` holds something else; MissingExtraError if the
    runtime's package is not installed; the errors of the source.

        folder = bc.export("out/nf4", "ort-cpu", "out/onnx")
        model = bc.open_model(folder.path)
        model.run(["a red cat"], size=(512, 512)).image.save("cat.png")
    """
    from bagel_compress.exporting.build import export as write_export
    from bagel_compress.exporting.source import WeightSource
    from bagel_compress.run.target import Target

    chosen = target if isinstance(target, Target) else Target.load(target)
    return write_export(WeightSource.open(_folder(source)), chosen, Path(out), progress)


def publish(
    build: str | Path | Artifact,
    repo: str,
    *,
    base_model: str | None = None,
    license: str = "apache-2.0",
    revision: str = "main",
    private: bool = False,
    draft: bool = False,
    create_pr: bool = False,
    replace: bool = False,
    signing_key: str | Path | None = None,
    receipts: str | Path = "exports/receipts",
    collection: str = "",
) -> PublishResult:
    """Verifies a build, writes its model card, uploads it as one commit and verifies the upload.

    `build` is an artifact or export whose reports pass; `repo` is `owner/name`. `base_model` is the Hub id of the
    source, needed if that was a folder. A `draft` may lack reports and can only go to a private repository or a pull
    request; `replace` replaces another build in the repository; `create_pr` offers the build to a repository of
    somebody else. `receipts` is the folder for receipts, small JSON files about what was published; `collection` is the
    title of a collection to add the build to.

    Raises GateError if the build may not be published or the upload differs from it, PublishError if the repository
    cannot take it, HubError if the Hub refuses, ArtifactError if the folder is no build.

        done = bc.publish("out/nf4", "you/BAGEL-7B-MoT-NF4", base_model="ByteDance-Seed/BAGEL-7B-MoT")
        print(done.uploaded.url)
        print([receipt.name for receipt in done.receipts])
    """
    from bagel_compress.publishing.pipeline import PublishRequest
    from bagel_compress.publishing.pipeline import publish as run

    request = PublishRequest(
        _folder(build),
        repo,
        base_model=base_model,
        license=license,
        receipts=Path(receipts),
        revision=revision,
        private=private,
        draft=draft,
        create_pr=create_pr,
        replace=replace,
        signing_key=None if signing_key is None else Path(signing_key),
        collection=collection,
    )
    return run(request, lambda name, sent, total: log.info("%d of %d bytes sent; %s", sent, total, name or "all"))


def _folder(build: str | Path | Artifact) -> Path:
    """The folder of an Artifact, or the path that was given."""
    return Path(build) if isinstance(build, str | Path) else build.path
