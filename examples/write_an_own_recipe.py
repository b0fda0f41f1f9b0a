"""Write an own recipe, see what it would take, and build it.

    python examples/write_an_own_recipe.py [CHECKPOINT] [OUT]

A recipe is a list of rules; the first one that matches a tensor decides its format. Without arguments the small model
that comes with the package is built.
"""

from __future__ import annotations

import sys
from pathlib import Path

import bagel_compress as bc

NANO = Path(bc.__file__).parent / "data" / "BAGEL-nano"
RECIPE = """
name: mine
summary: what draws in 8 bits, what understands in 4, everything else as it is
rules:
  - match: {component: llm, expert: gen, kind: linear}
    codec: {format: fp8}
  - match: {component: llm, expert: und, kind: linear, block: mlp}
    codec: {format: nf4, double_quant: true}
  - match: {}
    codec: raw
limits: {class: 4-bit}
"""


def main(source: str = str(NANO), out: str = "out/nano-mine") -> None:
    recipe = bc.Recipe.parse(RECIPE, "my recipe")
    try:
        bc.Recipe.parse(RECIPE.replace("expert: gen", "expert: gne"), "my recipe")
    except bc.BagelCompressError as error:
        print(f"a misspelt recipe is refused: {error}")

    checkpoint = bc.Checkpoint.open(source)
    plan = bc.make_plan(checkpoint, recipe)
    for group in plan.groups:
        print(f"{group.codec:<6}{group.tensors:>6} tensors{group.nbytes:>14,} bytes")

    artifact = bc.compress(plan, checkpoint, out)
    print(f"{artifact.path}: {plan.nbytes:,} bytes of weights")


if __name__ == "__main__":
    main(*sys.argv[1:])
