"""Every packaging of the same weights gives the same artifact, byte for byte."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pipeline_data import TINY, Write, folder_bytes
from safetensors.torch import save_file

from bagel_compress.build.compress import compress
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.errors import CheckpointError
from bagel_compress.source.checkpoint import Checkpoint

Tensors = dict[str, torch.Tensor]
Q = "language_model.model.layers.0.self_attn.q_proj.weight"
DOWN = "language_model.model.layers.2.mlp_moe_gen.down_proj.weight"


def artifact_bytes(checkpoint: Checkpoint, recipe: Recipe, out: Path) -> dict[str, object]:
    """Every file of the build; the manifest without its words on where values came from."""
    compress(make_plan(checkpoint, recipe), checkpoint, out)
    files: dict[str, object] = dict(folder_bytes(out))
    manifest = json.loads((out / "manifest.json").read_bytes())
    manifest["source"] |= {"adapter": None, "base": None}
    return files | {"manifest.json": manifest}


def _fp32(write: Write, tensors: Tensors) -> Path:
    return write({n: t.float() for n, t in tensors.items()}, file="model.safetensors")


def _fp32_between(write: Write, tensors: Tensors) -> Path:
    """fp32 masters that round to the bf16 weights: less than half a step away."""
    return write({n: t.float() * (1 + 2.0**-10) for n, t in tensors.items()})


def _sharded(write: Write, tensors: Tensors) -> Path:
    names = list(tensors)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    folder = write({n: tensors[n] for n in names[::2]}, file=files[0])
    save_file({n: tensors[n] for n in names[1::2]}, folder / files[1])
    index = {"metadata": {}, "weight_map": {n: files[i % 2] for i, n in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _wrapped(write: Write, tensors: Tensors) -> Path:
    return write(
        {
            f"module._fsdp_wrapped_module.{n.replace('.layers.0.', '.layers.0._fsdp_wrapped_module.')}": t
            for n, t in tensors.items()
        }
    )


def _model_prefix(write: Write, tensors: Tensors) -> Path:
    return write({f"model.{n}": t.float() for n, t in tensors.items()}, file="model.safetensors")


def _weights_only(write: Write, tensors: Tensors) -> Path:
    return write(tensors, aux=False)


VARIANTS: list[Callable[[Write, Tensors], Path]] = [
    _fp32, _fp32_between, _sharded, _wrapped, _model_prefix, _weights_only,
]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_give_the_same_artifact(
    write: Write,
    tensors: Tensors,
    tiny: Checkpoint,
    nf4: Recipe,
    tmp_path: Path,
    variant: Callable[[Write, Tensors], Path],
) -> None:
    folder = variant(write, tensors)
    checkpoint = Checkpoint.open(folder, base=TINY if variant is _weights_only else None)
    assert checkpoint.digest == tiny.digest
    assert artifact_bytes(checkpoint, nf4, tmp_path / "a") == artifact_bytes(tiny, nf4, tmp_path / "b")


def test_a_single_file_is_a_source(write: Write, tensors: Tensors, tiny: Checkpoint) -> None:
    folder = write({n: t + 1 for n, t in tensors.items()})
    save_file(tensors, folder / "other.safetensors")
    assert Checkpoint.open(folder / "other.safetensors").digest == tiny.digest
    assert Checkpoint.open(folder).digest != tiny.digest


def test_half_precision_and_unpadded_headers(write: Write, tensors: Tensors) -> None:
    folder = write({n: t.half() for n, t in tensors.items()})
    path = folder / "ema.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip() + b" "
    header += b" " * (1 - len(header) % 2)  # odd: every tensor lies at an odd offset
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    checkpoint = Checkpoint.open(folder)
    for spec in checkpoint.specs:
        expected = tensors[spec.name].half().bfloat16().reshape(-1)
        assert checkpoint.read(spec, 0, spec.numel).equal(expected)


def adapter(folder: Path, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], **config: object) -> Path:
    folder.mkdir()
    rank = next(iter(pairs.values()))[0].shape[0]
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {}
    for name, (a, b) in pairs.items():
        module = name.removesuffix(".weight")
        tensors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def pairs_for(
    tensors: Tensors, names: tuple[str, ...] = (Q, DOWN), rank: int = 4
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: (
            torch.randn(rank, tensors[name].shape[1], generator=generator) * 0.1,
            torch.randn(tensors[name].shape[0], rank, generator=generator) * 0.1,
        )
        for name in names
    }


def merged(tensors: Tensors, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], scale: float) -> Tensors:
    result = dict(tensors)
    for name, (a, b) in pairs.items():
        result[name] = (tensors[name].double() + scale * (b.double() @ a.double())).float().bfloat16()
    return result


@pytest.mark.parametrize(
    ("config", "scale"), [({}, 2.0), ({"use_rslora": True}, 4.0), ({"alpha_pattern": {"q_proj|down_proj": 2}}, 0.5)]
)
def test_lora_is_merged_while_reading(
    write: Write, tensors: Tensors, nf4: Recipe, tmp_path: Path, config: dict[str, object], scale: float
) -> None:
    pairs = pairs_for(tensors)
    folder = adapter(tmp_path / "lora", pairs, **config)
    tuned = Checkpoint.open(TINY, lora=folder)
    expected = Checkpoint.open(write(merged(tensors, pairs, scale)))
    assert tuned.digest == expected.digest
    assert artifact_bytes(tuned, nf4, tmp_path / "a") == artifact_bytes(expected, nf4, tmp_path / "b")


def test_merged_words_do_not_depend_on_the_chunks(tensors: Tensors, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(TINY, lora=adapter(tmp_path / "lora", pairs_for(tensors)))
    whole = checkpoint.bf16_words(DOWN, 0, tensors[DOWN].numel())
    cuts = [0, 1, 159, 160, 161, 5000, 5001, whole.size]
    pieces = [checkpoint.bf16_words(DOWN, a, b) for a, b in itertools.pairwise(cuts)]
    assert np.array_equal(np.concatenate(pieces), whole)


def test_modules_saved_whole_replace_the_base(tensors: Tensors, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "lora", pairs_for(tensors))
    from safetensors.torch import load_file

    stored = load_file(folder / "adapter_model.safetensors")
    stored["base_model.model.llm2vae.weight"] = torch.full((64, 64), 0.25)
    save_file(stored, folder / "adapter_model.safetensors")
    checkpoint = Checkpoint.open(TINY, lora=folder)
    spec = next(s for s in checkpoint.specs if s.name == "llm2vae.weight")
    assert checkpoint.read(spec, 0, 4096).eq(0.25).all()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"use_dora": True}, "use_dora, which cannot be merged"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out, which cannot be merged"),
        ({"peft_type": "IA3"}, "does not describe a LoRA adapter"),
        ({"r": 8}, "has rank 4, adapter_config.json says 8"),
    ],
)
def test_adapters_that_cannot_be_merged(tensors: Tensors, tmp_path: Path, config: dict[str, object], says: str) -> None:
    folder = adapter(tmp_path / "lora", pairs_for(tensors), **config)
    with pytest.raises(CheckpointError, match=says):
        Checkpoint.open(TINY, lora=folder)


def test_adapters_of_another_model(tensors: Tensors, tmp_path: Path) -> None:
    a, b = pairs_for(tensors)[Q]
    with pytest.raises(CheckpointError, match="which this checkpoint does not have"):
        Checkpoint.open(TINY, lora=adapter(tmp_path / "x", {"unet.conv.weight": (a, b)}))
    with pytest.raises(CheckpointError, match=r"is \[64, 4\] x \[4, 63\], the weight is \[64, 64\]"):
        Checkpoint.open(TINY, lora=adapter(tmp_path / "y", {Q: (a[:, :63].contiguous(), b)}))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is not readable"):
        Checkpoint.open(TINY, lora=tmp_path)
