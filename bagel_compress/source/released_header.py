"""Names, dtypes and shapes of the released BAGEL-7B-MoT, without its 29 GB of weights.

They are derived from its configs by `bagel.layout`, so that `plan` works without a download.
1223 tensors, 14,607,260,128 parameters, 29,214,520,256 bytes in bf16 (bagel/layout.py; a test holds the totals).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from bagel.config import LLM_FILE, VIT_FILE, BagelConfig, read_json
from bagel.layout import ModelSizes, expected_tensors
from bagel_compress.io.packaged import FULL_CONFIGS
from bagel_compress.io.tensor_spec import TensorSpec

REPO = "ByteDance-Seed/BAGEL-7B-MoT"


@dataclass(frozen=True)
class TrueHeader:
    """Specs of the released checkpoint. A plan made from them has exact sizes; without weights it cannot be built."""

    name: str = REPO
    revision: str = ""

    @cached_property
    def specs(self) -> tuple[TensorSpec, ...]:
        """All tensors, in the order of the official file."""
        return tuple(TensorSpec("BF16", shape, name) for name, shape in expected_tensors(full_sizes()).items())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of names and shapes; never equal to the fingerprint of a real checkpoint."""
        rows = "".join(f"{spec.name} {list(spec.shape)}\n" for spec in self.specs)
        return hashlib.sha256(f"header only\n{rows}".encode()).hexdigest()


def full_sizes(layers: int | None = None) -> ModelSizes:
    """Sizes of BAGEL-7B-MoT, or of the same model with fewer decoder layers."""
    llm, vit = (read_json(FULL_CONFIGS / name) for name in (LLM_FILE, VIT_FILE))
    if layers is not None:
        llm["num_hidden_layers"] = layers
    return BagelConfig.from_mappings(llm, vit, {}, {}).sizes
