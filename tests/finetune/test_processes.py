"""Two gloo processes under torchrun do what one process does on the same batches."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import finetune_data as data
import pytest
import torch
import yaml
from safetensors.torch import load_file

from bagel_compress.build.compress import compress
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.source.checkpoint import Checkpoint

pytest.importorskip("pyarrow")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="torch's wheels for Windows have no libuv for torchrun"),
]
# Of the loss: sums are taken in another order. In bf16 the smallest difference of a weight may move an activation by
# one rounding, 2^-8 of it; the mean over some 200 tokens moves by less. Set before the first run.
EQUAL, EQUAL_BF16 = 1e-5, 2e-3


def start(processes: int, config: Path, out: Path) -> list[dict[str, float]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "bagel_compress", "finetune", str(config), "--out", str(out)]
    if processes > 1:
        options = ["--nproc-per-node", str(processes), "--master-port", str(port), "-m", *command[2:]]
        command = [sys.executable, "-m", "torch.distributed.run", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["fsdp", "adapters", "nf4", "nf4-bf16"])
def test_two_processes_equal_one(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights; adapters over full precision; adapters over an NF4 base, computed in fp32 and in bf16."""
    data.t2i(tmp_path / "t2i")
    data.vlm(tmp_path / "vlm")
    lora = None if kind == "fsdp" else {"rank": 2}
    settings = {
        "model": str(_nf4(tmp_path / "base") if "nf4" in kind else data.NANO),
        "steps": 4, "tokens": 200, "lr": 1e-3, "save_every": 2,
        "dtype": "bfloat16" if kind == "nf4-bf16" else "float32",
        "data": [{"kind": "t2i", "path": "t2i"}, {"kind": "vlm", "path": "vlm", "jsonl": "vlm/data.jsonl"}],
        "lora": lora, "ema": 0.5,
        "eps": 1e-8,  # with the official 1e-15 AdamW makes whole steps of the rounding of vanishing gradients
    }  # fmt: skip
    for name, more in (("one", {"accumulate": 2}), ("two", {"steps": 2}), ("longer", {})):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings | more))
    one = start(1, tmp_path / "one.yaml", tmp_path / "one")
    two = start(2, tmp_path / "two.yaml", tmp_path / "two")
    assert [line["step"] for line in two] == [1, 2]
    two = start(2, tmp_path / "longer.yaml", tmp_path / "two")  # goes on from shards that two processes wrote
    equal = EQUAL_BF16 if kind == "nf4-bf16" else EQUAL
    for alone, shared in zip(one, two, strict=True):
        for key in ("loss", "ce", "mse"):
            assert shared[key] == pytest.approx(alone[key], abs=equal * alone["loss"]), (key, alone["step"])
        assert shared["norm"] == pytest.approx(alone["norm"], rel=100 * equal)
        assert shared["tokens"] == alone["tokens"]
    for name in ("adapter_model",) if lora else ("model", "ema"):
        ours, wanted = (load_file(tmp_path / who / "0000004" / f"{name}.safetensors") for who in ("two", "one"))
        for key, value in wanted.items():
            assert torch.allclose(ours[key].float(), value.float(), rtol=0.02, atol=2e-3), key
    if lora:
        monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "pipeline"))
        _opens_in_peft(tmp_path / "two" / "0000004")
    shards = list((tmp_path / "two" / "0000004" / "state").glob("*.safetensors"))
    assert len(shards) >= (2 if lora is None else 1)


def _nf4(out: Path) -> Path:
    """BAGEL-nano with its experts in NF4."""
    checkpoint = Checkpoint.open(data.NANO)
    return compress(make_plan(checkpoint, Recipe.load("nf4-nearest")), checkpoint, out).path


def _opens_in_peft(adapter: Path) -> None:
    """peft merges it into the linears' weights as our reader of checkpoints does."""
    from peft_oracle import merged_by_peft

    plain, ours = Checkpoint.open(data.NANO), Checkpoint.open(data.NANO, lora=adapter)
    names = {
        n.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
        for n in load_file(adapter / "adapter_model.safetensors")
    }
    specs = [s for s in plain.specs if s.name.removesuffix(".weight") in names and s.name.endswith(".weight")]
    assert len(specs) == len(names) > 50
    weights = {s.name: plain.read(s, 0, s.numel).reshape(s.shape).float() for s in specs}
    theirs = merged_by_peft(weights, "", adapter)
    for spec in specs:
        merged, wanted = ours.read(spec, 0, spec.numel).reshape(spec.shape).float(), theirs[spec.name]
        assert bool(((merged - wanted).abs() <= wanted.abs() * 2.0**-8 + 1e-6).all()), spec.name
