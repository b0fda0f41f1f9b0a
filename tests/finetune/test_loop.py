"""The loop on BAGEL-nano: it resumes exactly, writes what others read, and refuses what it cannot go on with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import finetune_data as data
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("pyarrow")

from bagel.sampler import Sampler
from bagel_compress.build.artifact import Artifact
from bagel_compress.errors import FinetuneError
from bagel_compress.finetune.config import FinetuneConfig
from bagel_compress.finetune.loop import Trainer
from bagel_compress.finetune.lora import attach
from bagel_compress.finetune.processes import Processes
from bagel_compress.finetune.trainee import open_trainee
from bagel_compress.run.load import load_checkpoint, open_model
from bagel_compress.source.checkpoint import Checkpoint

LORA = {"rank": 4, "alpha": 8, "match": [{"component": "llm", "kind": "linear", "layer": "0-1"}]}


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("data")
    data.edit(folder / "edit")
    data.vlm(folder / "vlm")
    return [
        {"kind": "t2i", "path": str(data.t2i(folder / "t2i"))},
        {"kind": "edit", "path": str(folder / "edit")},
        {"kind": "vlm", "path": str(folder / "vlm"), "jsonl": str(folder / "vlm" / "data.jsonl")},
    ]


def config(groups: list[dict[str, Any]], **more: Any) -> FinetuneConfig:
    settings = {"model": str(data.NANO), "data": groups, "steps": 4, "tokens": 200, "lr": 1e-3, "dtype": "float32"}
    return FinetuneConfig.model_validate(settings | {"save_every": 2, "accumulate": 2} | more)


def run(made: FinetuneConfig, out: Path, stop: int | None = None) -> list[dict[str, float]]:
    trainer = Trainer(open_trainee(made, Processes()), made, out)
    found = []
    for result in trainer.steps():
        found.append({k: v for k, v in result.metrics.items() if k != "seconds"})
        if result.step == stop:
            break
    return found


@pytest.mark.parametrize("more", [{"lora": LORA, "ema": 0.9}, {}], ids=["adapters", "all-weights"])
def test_a_killed_run_goes_on_with_the_same_losses(
    groups: list[dict[str, Any]], tmp_path: Path, more: dict[str, Any]
) -> None:
    made = config(groups, warmup=2, schedule="cosine", **more)
    straight = run(made, tmp_path / "a")
    assert straight[0]["loss"] > 0
    assert len({line["loss"] for line in straight}) == 4
    run(made, tmp_path / "b", stop=3)  # killed after its save of step 2
    assert run(made, tmp_path / "b") == straight[2:]
    lines = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    names = [p.name for p in sorted((tmp_path / "a").iterdir())]
    assert names == ["0000002", "0000004", "config.json", "metrics.jsonl"]
    assert not (tmp_path / "a" / "0000002" / "state").exists()
    for file in (tmp_path / "a" / "0000004").glob("*.safetensors"):
        assert load_file(file).keys() == load_file(tmp_path / "b" / "0000004" / file.name).keys()
        assert file.read_bytes() == (tmp_path / "b" / "0000004" / file.name).read_bytes()


def test_the_official_layout_opens_and_is_a_source(groups: list[dict[str, Any]], tmp_path: Path) -> None:
    made = config(groups, steps=2, ema=0.5, freeze=[{"component": "vit"}, {"component": "llm", "expert": "und"}])
    run(made, tmp_path)
    folder = tmp_path / "0000002"
    before, after = Checkpoint.open(data.NANO), Checkpoint.open(folder)  # takes ema.safetensors
    model = Checkpoint.open(folder / "model.safetensors")
    for spec in before.specs:
        old, new, raw = (c.read(spec, 0, spec.numel) for c in (before, after, model))
        moved = "moe_gen" in spec.name or spec.name.startswith(("vae2llm", "llm2vae", "time_", "connector"))
        moved |= spec.name.startswith(("language_model.lm_head", "language_model.model.embed"))
        if not moved:
            assert torch.equal(old, raw), spec.name
        elif spec.numel > 1000:  # a step may round away in a few norms
            assert not torch.equal(old, raw), spec.name
            assert not torch.equal(new, raw), spec.name
    assert isinstance(open_model(folder), Sampler)


def test_peft_files_merge_and_run_beside_the_base(groups: list[dict[str, Any]], tmp_path: Path) -> None:
    """What is merged while the checkpoint is read is what runs as an adapter."""
    run(config(groups, lora=LORA, steps=2, lr=2e-2), tmp_path)
    folder = tmp_path / "0000002"
    merged = load_checkpoint(Checkpoint.open(data.NANO, lora=folder), dtype=torch.float32)
    beside, plain = open_model(data.NANO, dtype=torch.float32), open_model(data.NANO, dtype=torch.float32)
    attach(beside.bagel, folder)
    settings = {"size": (32, 32), "seed": 1}
    first, second, third = (s.run(["a red circle"], **settings).latent for s in (merged, beside, plain))
    assert (first - second).norm() < 0.1 * (third - second).norm()  # the merge is rounded to bf16


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"lr": 2e-3}, "holds a run with another lr; give another --out"),
        ({"accumulate": 1}, "another accumulate, processes times accumulate"),
    ],
)
def test_another_config_does_not_go_on(
    groups: list[dict[str, Any]], tmp_path: Path, more: dict[str, Any], says: str
) -> None:
    run(config(groups, steps=2, lora=LORA), tmp_path)
    with pytest.raises(FinetuneError, match=says):
        run(config(groups, lora=LORA, **more), tmp_path)
    assert len(run(config(groups, lora=LORA, steps=3), tmp_path)) == 1  # more steps are no other config


def test_what_cannot_be_trained(groups: list[dict[str, Any]], tmp_path: Path, coded: Artifact) -> None:
    for more, says in (
        ({"model": str(coded.path)}, "compressed artifact, whose weights stay as they are; train a lora"),
        ({"model": str(coded.path), "lora": LORA}, r"layers.2.\S+ \(\w+\) computes in bfloat16; leave dtype away"),
        ({"dtype": "bfloat16"}, "start with torchrun"),
        ({"lora": LORA, "freeze": [{"component": "llm"}]}, "leave no linear"),
        ({"lora": {"match": [{"component": "llm", "kind": "norm"}]}}, "is no linear"),
        ({"freeze": [{"layer": 99}]}, "no tensor of this model is layer: 99"),
        ({"freeze": [{}]}, "nothing is trained"),
        ({"tokens": 20}, "tokens long, a packed batch holds 20"),
        ({"lr": 1e30}, "the loss of step 2 is"),
        ({"data": []}, "no data groups"),
    ):
        with pytest.raises(FinetuneError, match=says):
            run(config(groups).model_validate(config(groups).model_dump() | more), tmp_path / says[:9])


def test_tensorboard_shows_what_the_metrics_say(groups: list[dict[str, Any]], tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    made = config(groups, lora=LORA, tensorboard=True)
    run(made, tmp_path, stop=3)  # killed after its save of step 2
    run(made, tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "ce", "mse", "norm", "lr", "tokens", "damaged_rows"):
        shown = {event.step: event.value for event in events.Scalars(name)}
        assert shown == pytest.approx({line["step"]: line[name] for line in lines}), name
    assert len(lines) == 4


def test_the_verb(cli: Callable[..., tuple[int, str, str]], groups: list[dict[str, Any]], tmp_path: Path) -> None:
    import yaml

    text = yaml.safe_dump({
        "model": str(data.NANO), "data": groups, "steps": 1, "tokens": 300, "lora": {"rank": 2},
    })  # fmt: skip
    (tmp_path / "c.yaml").write_text(text)
    code, out, err = cli("finetune", tmp_path / "c.yaml", "--out", tmp_path / "run", "--json")
    assert (code, json.loads(out)["step"]) == (0, 1)
    assert "1/1  loss" in err
    (tmp_path / "c.yaml").write_text(text.replace("rank: 2", "rank: 3"))
    code, _, err = cli("finetune", tmp_path / "c.yaml", "--out", tmp_path / "run")
    assert code == 2
    assert "holds a run with another lora" in err
