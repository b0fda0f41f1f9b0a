"""Compress a fine-tune of BAGEL and read the result back.

    python examples/compress_a_fine_tune.py CHECKPOINT [RECIPE] [OUT] [BASE]

CHECKPOINT is a folder, a .safetensors file or a Hub id, in any layout that trainers write; BASE is the model that the
configs, the tokenizer and the VAE are taken from where the fine-tune lacks them. Without arguments the small model that
comes with the package is compressed.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import bagel_compress as bc

NANO = Path(bc.__file__).parent / "data" / "BAGEL-nano"


def main(source: str = str(NANO), recipe: str = "nf4", out: str = "out/nano-nf4", base: str | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # the library logs its progress as "bagel_compress"
    checkpoint = bc.Checkpoint.open(source, base=base)
    plan = bc.make_plan(checkpoint, bc.Recipe.load(recipe))
    print(plan.table())  # exact sizes, known before anything is read

    artifact = bc.compress(plan, checkpoint, out)  # run it again after an interruption: it continues from there
    faults = artifact.verify()
    print(f"{artifact.path}: artifact {artifact.digest[:12]}, {'; '.join(faults) or 'every byte as its manifest says'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
