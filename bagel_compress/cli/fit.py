"""The verb fit: finds the recipe with the most bits per weight that a GPU's memory holds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bagel_compress.cli import add_json, add_verb, emit, say

if TYPE_CHECKING:
    from bagel_compress.budgets.fit import Fitted
    from bagel_compress.build.recipe import Recipe
    from bagel_compress.run.target import Target
    from bagel_compress.source.checkpoint import Checkpoint

TASKS = ("t2i", "edit", "understand", "think")


def register(verbs: Any) -> None:
    """Adds the parser of fit."""
    parser = add_verb(
        verbs, "fit", "write the recipe with the most bits per weight that a GPU holds; needs no GPU and no weights",
        "bagel-compress fit --target 12gb --out my-12gb.yaml\n"
        "  bagel-compress fit --target 8gb --tasks t2i --out draw-8gb.yaml\n"
        "  bagel-compress fit --target 16gb --gib 11.3 --disk-gb 9 --out small.yaml\n"
        "  bagel-compress fit --target 12gb --source BAGEL-7B-MoT --calibration bagel.calibration.safetensors"
        " --device cuda --out best-12gb.yaml",
    )  # fmt: skip
    parser.add_argument("--target", required=True, metavar="TARGET", help="target file, or the name of a packaged one")
    parser.add_argument(
        "--gib", type=float, metavar="G", help="limit of the memory to use, in GiB (default: all of it)"
    )
    parser.add_argument("--disk-gb", type=float, metavar="G", help="largest size of all weight files, in 1e9 bytes")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, metavar="TASK", help="t2i edit understand think (all)")
    parser.add_argument(
        "--recipe", default="ecq-12gb", metavar="RECIPE", help="recipe whose rates are changed (%(default)s)"
    )
    parser.add_argument("--source", metavar="SRC", help="checkpoint to plan for (default: the released one's header)")
    parser.add_argument(
        "--calibration", metavar="FILE",
        help="calibration set to measure the sensitivity of --source's weights on, by which bits are then distributed",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="device of that measurement: cpu, cuda, cuda:1 (default cpu)")
    parser.add_argument("--name", metavar="NAME", help="name of the recipe (default: made from the target's)")
    parser.add_argument("--out", metavar="FILE", help="file to write the recipe to (default: print it)")
    add_json(parser)
    parser.set_defaults(verb=_fit)


def _fit(args: argparse.Namespace) -> int:
    from bagel_compress.errors import TargetError
    from bagel_compress.io.atomic import write_atomic

    out = None if args.out is None else Path(args.out)
    if out is not None and not out.absolute().parent.is_dir():
        raise TargetError(f"--out {out}: the folder {out.parent} does not exist; make it first.")
    fitted = _fitted(args)
    text = fitted.to_yaml()
    if out is None:
        shown = text
    else:
        write_atomic(out, text.encode())
        shown = "\n".join([_summary(fitted), f"{out}", f"next: bagel-compress compress {out} --source SRC --out DIR"])
    data = {
        "recipe": fitted.recipe.model_dump(mode="json", by_alias=True),
        "bits": fitted.bits,
        "peak_bytes": int(fitted.peak),
        "limit_bytes": int(fitted.target.limit),
        "weights_bytes": fitted.nbytes,
        "budget": fitted.report.model_dump(mode="json"),
        "path": None if out is None else str(out),
    }
    emit(args, data, shown.rstrip("\n"))
    return 0


def _fitted(args: argparse.Namespace) -> Fitted:
    from bagel_compress.budgets.fit import fit
    from bagel_compress.budgets.planned_build import checkpoint_sizes
    from bagel_compress.build.recipe import Recipe
    from bagel_compress.errors import CalibrationError
    from bagel_compress.io.packaged import find_recipe
    from bagel_compress.run.target import Target
    from bagel_compress.source.checkpoint import Checkpoint
    from bagel_compress.source.released_header import TrueHeader

    target = _with_limit(Target.load(args.target), args.gib)
    family = Recipe.load(find_recipe(args.recipe))
    options = {"name": args.name, "disk_gb": args.disk_gb, "tasks": None if args.tasks is None else tuple(args.tasks)}
    if args.source is None and args.calibration is not None:
        raise CalibrationError("--calibration measures the weights of a checkpoint; give --source as well.")
    if args.source is None:
        return fit(family, TrueHeader(), target, say=say, **options)
    checkpoint = Checkpoint.open(args.source)
    folder, vae = checkpoint_sizes(checkpoint)
    if args.calibration is not None:
        options |= _measured(checkpoint, family, args)
    return fit(family, checkpoint, target, folder=folder, vae=vae, say=say, **options)


def _measured(checkpoint: Checkpoint, family: Recipe, args: argparse.Namespace) -> dict[str, Any]:
    """The arguments `effects` and `measured` of `fit`: sensitivities of the groups of weights, and what they come from.

    They are measured in the family's first calibrated format with a rate.
    """
    from bagel_compress.budgets.device_option import one_device
    from bagel_compress.build.plan import make_plan
    from bagel_compress.build.sensitivity import sensitivities
    from bagel_compress.cli.build import open_calibration
    from bagel_compress.errors import CalibrationError

    device = one_device(args.device)
    plan = make_plan(checkpoint, family, open_calibration(args.calibration))
    codec = next((p.codec for p in plan.placements if p.calibrated and hasattr(p.codec, "bits")), None)
    if codec is None or plan.calibration is None:
        raise CalibrationError(
            f"recipe {family.name} has no calibrated format with a rate (bits: ...), so there are no bits to distribute"
            " by a calibration set; give a recipe such as ecq-12gb."
        )
    found = sensitivities(checkpoint, plan.calibration, [codec], device, say)
    text = f"measured on {checkpoint.name} {checkpoint.digest[:12]}, calibration set {plan.calibration.digest[:12]}"
    return {"effects": {group: effect for group, (effect,) in found.items()}, "measured": text}


def _with_limit(target: Target, gib: float | None) -> Target:
    """The target with `gib` as its limit of device memory. Raises TargetError if it is more than the GPU has."""
    from bagel_compress.errors import TargetError

    if gib is None:
        return target
    if not 0 < gib * 2**30 <= target.device.usable:
        usable = target.device.usable / 2**30
        raise TargetError(f"--gib {gib:g}: target {target.name} has {usable:.2f} GiB; give at most that, above 0.")
    budget = target.budget.model_copy(update={"peak_gib": gib})
    return target.model_copy(update={"budget": budget, "name": f"{target.name}-{gib:g}gib"})


def _summary(fitted: Fitted) -> str:
    from bagel_compress.budgets.fit import table

    return table([fitted])
