"""The example that teaches a colour, from pictures to a validated build; PEFT reads what it leaves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from finetune_data import NANO

from bagel.layout import official_role
from bagel_compress.source.checkpoint import Checkpoint

ROOT = Path(__file__).parents[2]
SEEN, KEPT = 0.8, 0.02  # share of drawings that show the colour; loss of old scores. Set before the first run.


@pytest.mark.slow
def test_a_seventh_colour_is_learnt_and_the_old_ones_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "pipeline"))
    import teach_a_colour
    from peft_oracle import merged_by_peft

    learnt = teach_a_colour.main(str(tmp_path))
    assert learnt.passed
    assert learnt.build.verify() == []
    for recipe in (teach_a_colour.PUBLISHED, teach_a_colour.SMALL):
        assert learnt.one[recipe] >= SEEN * teach_a_colour.DRAWN, recipe
        for name, before in learnt.before.items():
            assert learnt.after[recipe][name] >= before - KEPT, (recipe, name)

    plain, ours = Checkpoint.open(NANO), Checkpoint.open(NANO, lora=learnt.adapter)
    names = [s for s in plain.specs if official_role(s.name).kind == "linear" and "_proj" in s.name]
    linears = {s.name: plain.read(s, 0, s.numel).reshape(s.shape) for s in names if s.name.endswith(".weight")}
    theirs = merged_by_peft({n: t.float() for n, t in linears.items()}, "", learnt.adapter)
    changed = 0
    for spec in ours.specs:
        if spec.name in linears:
            merged = ours.read(spec, 0, spec.numel).reshape(spec.shape)
            wanted = theirs[spec.name]
            rounding = wanted.abs() * 2.0**-8 + 1e-6
            assert bool(((merged.float() - wanted).abs() <= rounding).all()), spec.name
            changed += not torch.equal(merged, linears[spec.name])
    assert changed > 50
    sys.modules.pop("teach_a_colour")
