"""The verb allocate: chooses one of a recipe's formats for each group of weights, so that a build fits a size."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bagel_compress.cli import add_json, add_verb, emit, say
from bagel_compress.cli.build import add_calibration


def register(verbs: Any) -> None:
    """Adds the parser of allocate."""
    allocate = add_verb(
        verbs, "allocate", "assign a recipe's formats to the layers by measured sensitivity, within a given size",
        "bagel-compress allocate nf4-lean --source BAGEL-7B-MoT --calibration bagel.calibration.safetensors"
        " --budget-gb 9.05 --out my.yaml --device cuda\n"
        "  bagel-compress allocate nf4-lean --source BAGEL-nano --budget-gb 0.0024 --out nano-mixed.yaml",
    )  # fmt: skip
    allocate.add_argument("recipe", metavar="RECIPE", help="recipe with at least two lossy formats")
    allocate.add_argument("--source", required=True, metavar="SRC", help="checkpoint folder or Hub id")
    allocate.add_argument("--base", metavar="SRC", help="checkpoint that supplies what SRC lacks")
    allocate.add_argument("--lora", metavar="DIR", help="peft adapter folder to merge while reading")
    add_calibration(allocate)
    allocate.add_argument("--budget-gb", required=True, type=float, metavar="G", help="bytes of all shards, in 1e9")
    allocate.add_argument("--out", required=True, metavar="FILE", help="recipe file to write")
    allocate.add_argument("--device", default="cpu", help="where the layers run: cpu, cuda, cuda:1")
    add_json(allocate)
    allocate.set_defaults(verb=_allocate)


def _allocate(args: argparse.Namespace) -> int:
    from bagel_compress.budgets.device_option import one_device
    from bagel_compress.build.allocate import allocate, allocated_recipe, movable_codecs
    from bagel_compress.build.plan import make_plan
    from bagel_compress.build.recipe import Recipe
    from bagel_compress.build.recipe_text import recipe_text
    from bagel_compress.build.sensitivity import sensitivities
    from bagel_compress.cli.build import open_calibration, open_checkpoint
    from bagel_compress.errors import CalibrationError
    from bagel_compress.io.atomic import write_atomic
    from bagel_compress.io.packaged import find_recipe

    device, checkpoint = one_device(args.device), open_checkpoint(args)
    recipe = Recipe.load(find_recipe(args.recipe))
    plan = make_plan(checkpoint, recipe, open_calibration(args.calibration))
    codecs = movable_codecs(plan)
    if plan.calibration is None:
        raise CalibrationError(
            "allocate needs a calibration set to measure on; give --calibration FILE (from `bagel-compress calibrate`)."
        )
    effects = sensitivities(checkpoint, plan.calibration, codecs, device, say)
    found = allocate(plan, codecs, effects, int(args.budget_gb * 1e9))
    made = allocated_recipe(plan, found, Path(args.out).stem)
    source = f"{checkpoint.name} {checkpoint.digest[:12]}, calibration set {plan.calibration.digest[:12]}"
    comment = f"{plan.recipe.name} within {args.budget_gb:g} GB, measured on {source}.\n\n{found.table()}"
    write_atomic(Path(args.out), recipe_text(made, comment).encode())
    chosen = {f"{g.layer}.{g.expert}.{g.name}": codecs[i].format for g, i in found.chosen.items()}
    emit(args, {"out": args.out, "bytes": found.nbytes, "cost": found.cost, "chosen": chosen}, found.table())
    return 0
