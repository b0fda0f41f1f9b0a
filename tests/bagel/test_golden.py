"""The official model's recordings, replayed; and that the check notices what it must notice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from bagel.conformance.__main__ import main
from bagel.conformance.compare import MARGIN, _id_error, check, error
from bagel.conformance.packing import block_rows, merged_slots


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_every_scenario_is_within_its_limit(golden: Path, mode: str) -> None:
    manifest = json.loads((golden / "manifest.json").read_text())
    recorded = [name for name, s in manifest["scenarios"].items() if mode in s["runs"]]
    rows = check(golden, mode)
    assert [r.scenario for r in rows] == recorded
    assert [r for r in rows if not r.ok] == []


@pytest.fixture
def one_scenario(golden: Path, tmp_path: Path) -> Path:
    """A golden folder with one scenario, cheap to replay and to damage."""
    folder = tmp_path / "golden"
    shutil.copytree(golden / "checkpoint", folder / "checkpoint")
    (folder / "traces").mkdir()
    manifest = json.loads((golden / "manifest.json").read_text())
    manifest["scenarios"] = {"t2i_nocfg": manifest["scenarios"]["t2i_nocfg"]}
    for name in ("t2i_nocfg.fp32.safetensors", "out_t2i_nocfg.fp32.png", "img_a.png", "img_b.png"):
        shutil.copy(golden / "traces" / name, folder / "traces" / name)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_passes_and_prints_json(one_scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(one_scenario), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"]
    assert [s["scenario"] for s in printed["scenarios"]] == ["t2i_nocfg"]


@pytest.mark.parametrize("name", ["kv_cond.k2", "step1.v", "gen.out_latent0", "step0.v_cond"])
def test_one_value_off_by_one_percent_fails(one_scenario: Path, name: str) -> None:
    file = one_scenario / "traces" / "t2i_nocfg.fp32.safetensors"
    tensors = {n: t.clone() for n, t in load_file(file).items()}
    flat = tensors[name].view(-1)
    flat[flat.abs().argmax()] *= 1.01
    save_file(tensors, file)
    assert main([str(one_scenario)]) == 1
    assert check(one_scenario, "fp32")[0].tensor == name


def test_missing_file_fails(one_scenario: Path) -> None:
    (one_scenario / "traces" / "t2i_nocfg.fp32.safetensors").unlink()
    assert main([str(one_scenario)]) == 1


def test_missing_picture_fails(one_scenario: Path) -> None:
    (one_scenario / "traces" / "out_t2i_nocfg.fp32.png").unlink()
    assert main([str(one_scenario)]) == 1


def test_a_tensor_nobody_computes_fails(one_scenario: Path) -> None:
    file = one_scenario / "traces" / "t2i_nocfg.fp32.safetensors"
    save_file({**load_file(file), "step0.unheard_of": torch.zeros(3)}, file)
    manifest = json.loads((one_scenario / "manifest.json").read_text())
    manifest["scenarios"]["t2i_nocfg"]["runs"]["fp32"]["tensors"]["step0.unheard_of"] = ["float32", [3], 0]
    (one_scenario / "manifest.json").write_text(json.dumps(manifest))
    assert main([str(one_scenario)]) == 1


def test_wrong_usage_is_exit_2(tmp_path: Path) -> None:
    assert main([str(tmp_path)]) == 2


def test_integers_are_equal_or_infinitely_wrong() -> None:
    ids = torch.tensor([3, 5])
    assert error(ids.to(torch.int32), ids) == 0
    assert error(torch.tensor([3, 4], dtype=torch.int32), ids) == float("inf")
    assert error(torch.tensor([3.2, 5.0]), ids) == float("inf")
    assert error(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 5.0])) == pytest.approx(10**0.5 / 5)


def test_ids_are_compared_up_to_the_first_choice_too_close_to_call() -> None:
    """The logits at an id choose the one after it."""
    wanted, wide, near, inf = torch.tensor([7, 8, 9, 10]), 2 * MARGIN["fp32"], MARGIN["fp32"] / 2, float("inf")
    for margins, found, expected in (
        (None, [7, 8, 9, 10], 0), (None, [7, 8, 9, 11], inf), (None, [7, 8, 9], inf),
        ([wide, wide, wide, wide], [7, 8, 9, 11], inf), ([wide, wide, wide, wide], [7, 8, 9, 10, 11], inf),
        ([wide, wide, near, wide], [7, 8, 9, 11, 12], 0), ([wide, wide, near, wide], [7, 8, 11, 10], inf),
        ([wide, near, near, wide], [7, 8, 11], 0), ([wide, near, wide, wide], [7, 11, 9, 10], inf),
        ([wide, wide, wide, near], [7, 8, 9, 10, 11], 0), ([wide, wide, wide, near], [7, 8, 9, 11], inf),
    ):  # fmt: skip
        given = None if margins is None else torch.tensor(margins)
        assert _id_error(torch.tensor(found), wanted, given, "fp32") == expected, (margins, found)


def test_rows_of_a_merged_sequence_follow_their_own_cache() -> None:
    contexts = [SimpleNamespace(length=length) for length in (3, 3, 5)]
    query, cached = merged_slots(contexts, [2, 1, 1])
    assert query.tolist() == [3, 4, 8, 14]
    assert cached.tolist() == [0, 1, 2, 5, 6, 7, 9, 10, 11, 12, 13]


def test_rows_of_blocks_lie_between_their_wrappers() -> None:
    wrappers, rows = block_rows([2, 3])
    assert wrappers.tolist() == [0, 3, 4, 8]
    assert rows.tolist() == [1, 2, 5, 6, 7]
