"""The header of the released checkpoint without its 29 GB: names, dtypes and shapes of BAGEL-7B-MoT.

Generated from its configs by `bagel.layout`, so that `plan` works without any download.
1223 tensors, 14,607,260,128 parameters, 29,214,520,256 bytes in bf16 (bagel/layout.py; a test holds the totals).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

from bagel.layout import ModelSizes, expected_tensors
from bagel_compress.io.packaged import FULL_CONFIGS
from bagel_compress.io.tensor_spec import TensorSpec

REPO = "ByteDance-Seed/BAGEL-7B-MoT"


@dataclass(frozen=True)
class TrueHeader:
    """Specs of the released checkpoint; a plan made from it has exact sizes but cannot be built from."""

    name: str = REPO
    revision: str = ""

    @cached_property
    def specs(self) -> tuple[TensorSpec, ...]:
        """All tensors, in the order of the official file."""
        return tuple(TensorSpec("BF16", shape, name) for name, shape in expected_tensors(full_sizes()).items())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of names and shapes; no checkpoint has this one."""
        rows = "".join(f"{spec.name} {list(spec.shape)}\n" for spec in self.specs)
        return hashlib.sha256(f"header only\n{rows}".encode()).hexdigest()


def full_sizes(layers: int | None = None) -> ModelSizes:
    """Sizes of BAGEL-7B-MoT, or of the same model with fewer decoder layers."""
    llm = json.loads((FULL_CONFIGS / "llm_config.json").read_text(encoding="utf-8"))
    vit = json.loads((FULL_CONFIGS / "vit_config.json").read_text(encoding="utf-8"))
    return ModelSizes(
        hidden=llm["hidden_size"],
        intermediate=llm["intermediate_size"],
        layers=llm["num_hidden_layers"] if layers is None else layers,
        heads=llm["num_attention_heads"],
        kv_heads=llm["num_key_value_heads"],
        vocab=llm["vocab_size"],
        vit_hidden=vit["hidden_size"],
        vit_intermediate=vit["intermediate_size"],
        vit_layers=vit["num_hidden_layers"] - 1,  # the last SigLIP block is not stored
    )
