"""What `bagel_compress.interop` uses of the official repository, as stand-ins: classes with the official names of
modules and tensors, and no forward pass of a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from bagel.layout import official_role
from bagel.vae import AutoEncoder, VAEConfig
from bagel_compress.build.artifact import Artifact


def provide(monkeypatch: pytest.MonkeyPatch, artifact: Artifact) -> None:
    """Makes the official names importable; `Bagel` has the tensors of this artifact's model."""

    def module(name: str, **attributes: Any) -> None:
        made = ModuleType(name)
        made.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, made)

    for package in ("modeling", "data"):
        module(package)
    module(
        "modeling.bagel",
        Qwen2Config=Config, SiglipVisionConfig=Config, BagelConfig=lambda **settings: SimpleNamespace(**settings),
        Qwen2ForCausalLM=lambda config: config, SiglipVisionModel=lambda config: config,
        Bagel=lambda language, vit, settings: Bagel(artifact),
    )  # fmt: skip
    sys.modules["modeling"].bagel = sys.modules["modeling.bagel"]  # type: ignore[attr-defined]
    module("modeling.qwen2", Qwen2Tokenizer=SimpleNamespace(from_pretrained=lambda folder: Path(folder).name))
    module("modeling.autoencoder", AutoEncoder=autoencoder, AutoEncoderParams=SimpleNamespace)
    module("data.data_utils", add_special_tokens=lambda tokenizer: (tokenizer, {"bos_token_id": 1}, 0))
    module("data.transforms", ImageTransform=lambda *sides: sides)
    module("inferencer", InterleaveInferencer=Inferencer)


class Config(SimpleNamespace):
    @classmethod
    def from_json_file(cls, file: str) -> Config:
        return cls(**json.loads(Path(file).read_text("utf-8")))


class Bagel(nn.Module):
    """A tree of modules with the official names: linears as linears, all else as bare parameters."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__()
        specs = {spec.name: spec for unit in artifact.units() for spec in unit.specs}
        for name, spec in specs.items():
            path, _, leaf = name.rpartition(".")
            owner: nn.Module = self
            *above, last = path.split(".")
            for part in above:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
            if leaf == "weight" and official_role(name).kind in ("linear", "head"):
                owner.add_module(last, nn.Linear(spec.shape[1], spec.shape[0], f"{path}.bias" in specs))
            elif not isinstance(getattr(owner, last, None), nn.Linear):
                if not hasattr(owner, last):
                    owner.add_module(last, nn.Module())
                getattr(owner, last).register_parameter(leaf, nn.Parameter(torch.empty(spec.shape)))
        embeddings = self.get_submodule("vit_model.vision_model.embeddings")
        embeddings.convert_conv2d_to_linear = lambda config, meta: None


def autoencoder(params: Any) -> AutoEncoder:
    sizes = VAEConfig(params.ch, tuple(params.ch_mult), params.num_res_blocks, params.z_channels)
    return AutoEncoder(sizes)


class Inferencer:
    def __init__(
        self, model: nn.Module, vae: nn.Module, tokenizer: str, vae_rule: Any, vit_rule: Any, ids: Any
    ) -> None:
        self.model, self.vae, self.tokenizer, self.rules = model, vae, tokenizer, (vae_rule, vit_rule)

    def __call__(self, text: str) -> dict[str, Image.Image]:
        head = self.model.get_submodule("language_model.lm_head")
        shade = int(head(torch.ones(1, head.in_features, dtype=torch.bfloat16)).float().abs().mean().clamp(0, 1) * 255)
        return {"image": Image.new("RGB", (16, 16), (shade, shade, shade))}
