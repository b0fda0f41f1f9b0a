"""The verbs run (plan, compress, trace, validate and report) and demo (the same for the packaged BAGEL-nano)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bagel_compress.cli import add_json, emit, say
from bagel_compress.cli.build import add_calibration, open_calibration, open_checkpoint, progress_bar
from bagel_compress.cli.calibrate import record_set
from bagel_compress.cli.export import follow_recipe
from bagel_compress.cli.validate import table

if TYPE_CHECKING:
    from bagel_compress.build.artifact import Artifact
    from bagel_compress.parity.report_data import ParityReport
    from bagel_compress.source.checkpoint import Checkpoint

DEMO_MODEL = "BAGEL-nano"
DEMO_RECIPES = ("nf4", "nf4-nearest", "nf4-official", "fp8-24gb", "int8-24gb", "df11")
DEMO_CASES = ("draw_two", "edit_recolor", "ask_describe", "think_draw")  # one of each task, as validation requires
# Largest picture side of a set of packaged cases in pixels, and the folder of the set.
CASES_BY_SIDE = ((1024, "."), (128, "tiny"), (0, "nano"))


def register(verbs: Any) -> None:
    """Adds the parsers of run and demo."""
    run = verbs.add_parser(
        "run",
        help="plan, compress, trace, validate and report; run it again to continue",
        description="Plan, compress, trace the reference, validate against it and report. Finished parts are kept. "
        "Exit 1 if a limit of the recipe is broken.",
        epilog="examples:\n  bagel-compress run recipes/nf4.yaml --source BAGEL-7B-MoT --out out/nf4 --device cuda\n"
        "  bagel-compress run nf4 --source BAGEL-7B-MoT --out out/nf4 --trace bagel.trace.safetensors",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("recipe", metavar="RECIPE", help="recipe file, or the name of one that comes with the package")
    run.add_argument("--source", required=True, metavar="SRC", help="full-precision checkpoint: folder or Hub id")
    run.add_argument(
        "--base", metavar="SRC", help="checkpoint that supplies configs, tokenizer and VAE if SRC lacks them"
    )
    run.add_argument("--lora", metavar="DIR", help="peft adapter folder to merge while reading")
    run.add_argument("--out", required=True, metavar="DIR", help="folder of the artifact; the trace lies beside it")
    run.add_argument("--trace", metavar="FILE", help="trace of the source to use (default: DIR.trace.safetensors)")
    run.add_argument("--cases", metavar="CASE", nargs="+", help="cases to trace (default: packaged ones)")
    add_calibration(run)
    run.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default cpu)")
    add_json(run)
    run.set_defaults(verb=_run)

    demo = verbs.add_parser(
        "demo",
        help="compress, validate and report a small built-in BAGEL",
        description="Compresses the BAGEL that comes with the package, compares it with its full-precision self and "
        "writes a report with pictures. Needs no download and no GPU.",
        epilog="examples:\n  bagel-compress demo\n  bagel-compress demo --out /tmp/demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument("--out", default="out/demo", metavar="DIR", help="where it is written (%(default)s)")
    add_json(demo)
    demo.set_defaults(verb=_demo)


def _run(args: argparse.Namespace) -> int:
    from bagel_compress.budgets.device_option import one_device

    for name in args.device.split(","):
        one_device(name)
    checkpoint = open_checkpoint(args)
    artifact = _compress(args, checkpoint)
    trace = Path(args.trace or f"{Path(args.out)}.trace.safetensors")
    report = _validate(artifact, checkpoint, trace, args)
    page = artifact.path / "report.html"
    data, text, passed = report.model_dump(mode="json"), table(report, page), report.passed
    if artifact.manifest.recipe.export:
        data["export"], lines, export_passed = follow_recipe(artifact, trace)
        text, passed = f"{text}\n\n{lines}", passed and export_passed
    emit(args, data | {"passed": passed, "page": str(page)}, text)
    return 0 if passed else 1


def _demo(args: argparse.Namespace) -> int:
    from bagel_compress.build.plan import make_plan
    from bagel_compress.build.recipe import Recipe
    from bagel_compress.io.atomic import write_atomic
    from bagel_compress.io.packaged import find_recipe, resource
    from bagel_compress.report import format_chart
    from bagel_compress.run.case import load_cases
    from bagel_compress.source.checkpoint import Checkpoint
    from bagel_compress.validation.compare_recipes import Counts, compare_recipes
    from bagel_compress.validation.recipes_page import render
    from bagel_compress.validation.recipes_page import table as family_table

    source, out = resource(DEMO_MODEL), Path(args.out)
    recipes = [find_recipe(name) for name in DEMO_RECIPES]
    cases = load_cases([resource("exports") / "cases" / "nano" / f"{name}.yaml" for name in DEMO_CASES])
    if not args.json:
        print(make_plan(Checkpoint.open(source), Recipe.load(recipes[0])).table(), end="\n\n", flush=True)
    family = compare_recipes(source, recipes, cases, out, Counts(), say)
    page = out / "report.html"
    chart = format_chart.section(format_chart.Figures.load())
    write_atomic(page, render(f"{DEMO_MODEL}, {len(recipes)} ways smaller", family, out, chart))
    passed = all(build.report.passed for build in family.builds)
    first = family.builds[0]
    text = f"{table(first.report, first.page)}\n\n{family_table(family)}\n\n{page}"
    data = {"passed": passed, "page": str(page), "builds": {b.name: b.to_json() for b in family.builds}}
    emit(args, data, text)
    return 0


def _compress(args: argparse.Namespace, checkpoint: Checkpoint) -> Artifact:
    """Plans and builds. The table of the plan is printed first, unless the output is JSON.

    If the recipe has calibrated rounding and --calibration was not given, a calibration set is recorded first, into a
    file beside the artifact.
    """
    from bagel_compress.build.compress import compress
    from bagel_compress.build.plan import make_plan
    from bagel_compress.build.recipe import Recipe
    from bagel_compress.io.packaged import find_recipe

    recipe, out = Recipe.load(find_recipe(args.recipe)), Path(args.out)
    plan = make_plan(checkpoint, recipe, open_calibration(args.calibration))
    if plan.calibrated and plan.calibration is None:
        path = Path(f"{out}.calibration.safetensors")
        if not path.exists():
            say("recording a calibration set")
            record_set(checkpoint, path, device=args.device)
        plan = make_plan(checkpoint, recipe, open_calibration(str(path)))
    if not args.json:
        print(plan.table(), end="\n\n", flush=True)
    with progress_bar(plan) as step:
        return compress(plan, checkpoint, out, step, args.device.partition(",")[0])


def _validate(artifact: Artifact, checkpoint: Checkpoint, trace: Path, args: argparse.Namespace) -> ParityReport:
    """Records the trace, unless --trace was given, and compares the artifact with it."""
    from bagel_compress.run.case import load_cases
    from bagel_compress.validation.artifact import record_source, validate_artifact

    if args.trace is None:
        record_source(checkpoint, load_cases(args.cases or [demo_cases(checkpoint)]), trace, args.device, progress=say)
    return validate_artifact(artifact.path, [trace], checkpoint, args.device, say)


def demo_cases(checkpoint: Checkpoint) -> Path:
    """The folder of the packaged cases with the largest pictures that the checkpoint can draw."""
    from bagel_compress.io.packaged import resource

    largest = largest_side(checkpoint)
    return resource("exports") / "cases" / next(cases for side, cases in CASES_BY_SIDE if largest >= side)


def largest_side(checkpoint: Checkpoint) -> int:
    """The side in pixels of the largest square picture that the model can draw."""
    from bagel.loading import read_config

    vae = {name: tensor.shape for name, tensor in checkpoint.vae.tensors.items()}
    config = read_config(checkpoint.files["llm_config.json"].parent, checkpoint.shapes, vae)
    return config.max_latent_size * config.image_stride
