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

pytest.importorskip("pyarrow")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="torch's wheels for Windows have no libuv for torchrun"),
]
EQUAL = 1e-5  # of the loss, in fp32: sums are taken in another order; set before the first run


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


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["fsdp", "adapters"])
def test_two_processes_equal_one(tmp_path: Path, lora: dict[str, int] | None) -> None:
    data.t2i(tmp_path / "t2i")
    data.vlm(tmp_path / "vlm")
    settings = {
        "model": str(data.NANO), "steps": 4, "tokens": 200, "lr": 1e-3, "dtype": "float32", "save_every": 2,
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
    for alone, shared in zip(one, two, strict=True):
        for key in ("loss", "ce", "mse"):
            assert shared[key] == pytest.approx(alone[key], abs=EQUAL * alone["loss"]), (key, alone["step"])
        assert shared["norm"] == pytest.approx(alone["norm"], rel=1e-3)
        assert shared["tokens"] == alone["tokens"]
    for name in ("adapter_model",) if lora else ("model", "ema"):
        ours, wanted = (load_file(tmp_path / who / "0000004" / f"{name}.safetensors") for who in ("two", "one"))
        for key, value in wanted.items():
            assert torch.allclose(ours[key].float(), value.float(), rtol=0.02, atol=2e-3), key
    shards = list((tmp_path / "two" / "0000004" / "state").glob("*.safetensors"))
    assert len(shards) >= (2 if lora is None else 1)
