"""peft is the oracle: what it makes of an adapter is what is read here, or the adapter is refused by name.

Slow, because importing peft alone takes longer than all tests of `test_adapter`, which hold the same rules to values
that were worked out by hand.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from peft_oracle import merged_by_peft, random_config, save_trained
from pipeline_data import TINY

from bagel_compress.errors import CheckpointError
from bagel_compress.source.checkpoint import Checkpoint

pytestmark = pytest.mark.slow
REFUSED = ("use_dora", "pissa", "pissa_niter_2", "olora")


def compare(tensors: dict[str, torch.Tensor], seed: int, folder: Path) -> str:
    """ "merged" or "refused"; fails where the values differ by more than one rounding to bf16."""
    root, settings = random_config(random.Random(seed))
    try:
        save_trained(tensors, root, settings, folder, seed)
    except ValueError:
        return "peft"  # no module of these names, or settings that exclude each other
    refused = "cannot be merged" if settings.get("use_dora") or settings["init_lora_weights"] in REFUSED else None
    try:
        expected = merged_by_peft(tensors, root, folder)
    except RuntimeError:  # a bias is added where the base has none, which peft cannot merge either
        refused = "lora_B.bias, which this checkpoint does not have"
    if refused is not None:
        with pytest.raises(CheckpointError, match=refused):
            Checkpoint.open(TINY, lora=folder)
        return "refused"
    checkpoint = Checkpoint.open(TINY, lora=folder)
    for spec in checkpoint.specs:
        found = checkpoint.read(spec, 0, spec.numel).float().reshape(spec.shape)
        wanted = expected.get(spec.name, tensors[spec.name].float())
        worst = ((found - wanted).abs() / wanted.abs().clamp(min=2.0**-120)).max().item()
        rounding = (found - wanted).abs() <= (wanted.abs() * 2.0**-8 + 1e-6)
        assert bool(rounding.all()), (seed, settings, spec.name, worst)
    return "merged"


def test_merges_as_peft_does_200_times(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    seen: dict[str, int] = {}
    for seed in range(1000, 1400):
        outcome = compare(tensors, seed, tmp_path / str(seed))
        seen[outcome] = seen.get(outcome, 0) + 1
        if seen.get("merged", 0) + seen.get("refused", 0) == 200:
            break
    print(seen)
    assert seen["merged"] >= 150
    assert seen["refused"] >= 5
