"""BAGEL's tensors as a plain tree of torch modules, adapters drawn at random, and peft's own merge of them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bagel.layout import official_role

Tensors = Mapping[str, torch.Tensor]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GEN = ("q_proj_moe_gen", "k_proj_moe_gen", "v_proj_moe_gen", "o_proj_moe_gen")
OTHERS = ("fc1", "fc2", "out_proj", "vae2llm", "llm2vae", "time_embedder.mlp.0", "lm_head", "embed_tokens")


def tree(tensors: Tensors, root: str = "") -> nn.Module:
    """A module with the same names and fp32 values: Linear and Embedding where the model has them. `root`: a part."""
    top = nn.Module()
    for name in sorted(tensors):
        if not name.startswith(root) or name.endswith(".bias"):
            continue
        path, _, leaf = name.removeprefix(root).rpartition(".")
        module = _leaf(name, leaf, tensors)
        parent = top
        *parts, last = path.split(".")
        for part in parts:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        if last in parent._modules:  # a norm was met before what lies in it; does not happen in BAGEL
            raise AssertionError(name)
        parent.add_module(last, module)
    return top


def _leaf(name: str, leaf: str, tensors: Tensors) -> nn.Module:
    values, kind = tensors[name].float(), official_role(name).kind
    bias = tensors.get(name.removesuffix("weight") + "bias")
    if kind in ("linear", "head"):
        module: nn.Module = nn.Linear(values.shape[1], values.shape[0], bias=bias is not None)
    elif kind in ("embedding", "position") and leaf == "weight":
        module = nn.Embedding(*values.shape)
    else:
        module = nn.Module()
        if bias is not None:
            module.bias = nn.Parameter(bias.float())
    setattr(module, leaf, nn.Parameter(values.clone()))
    if kind in ("linear", "head") and bias is not None:
        module.bias = nn.Parameter(bias.float())
    return module


def random_config(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """The part of BAGEL that is trained, and keyword arguments of a LoraConfig for it."""
    root = draw.choice(("", "", "language_model.", "language_model.model."))
    names = [*PROJECTIONS, *GEN, *(OTHERS if not root else ())]
    targets: Any = draw.sample(names, draw.randint(1, 5))
    if draw.random() < 0.2:
        targets = draw.choice((r".*layers\.[01]\..*(q|v)_proj", r".*mlp(_moe_gen)?\.(up|down)_proj", "all-linear"))
    config: dict[str, Any] = {"r": draw.choice((1, 2, 3, 8)), "lora_alpha": draw.choice((1, 4, 7, 16, 64))}
    config |= {"target_modules": targets, "use_rslora": draw.random() < 0.3, "lora_dropout": draw.choice((0.0, 0.1))}
    if draw.random() < 0.3:
        config["rank_pattern"] = {draw.choice(("q_proj", "k_proj|o_proj", r"layers\.1\..*", "^.*down_proj")): 5}
    if draw.random() < 0.3:
        config["alpha_pattern"] = {draw.choice(("up_proj", r"self_attn\.\w+", ".*layers.0.*", "fc1")): 11}
    if draw.random() < 0.3 and isinstance(targets, list):
        config["layers_to_transform"] = draw.choice((0, [1], [0, 1]))
        config["layers_pattern"] = draw.choice((None, "layers"))
    if draw.random() < 0.2:
        config["exclude_modules"] = draw.choice((["k_proj"], r".*layers\.0\..*", ["o_proj", "fc2"]))
    if draw.random() < 0.3 and targets != "all-linear":
        saved = ["llm2vae", "time_embedder.mlp.2", "connector.fc1"] if not root else ["norm"]
        config["modules_to_save"] = draw.sample(saved, 1)
    config["bias"] = draw.choice(("none", "none", "all", "lora_only"))
    config["init_lora_weights"] = draw.choice((True, True, False, "gaussian"))
    if config["init_lora_weights"] is True and draw.random() < 0.1:
        config["init_lora_weights"] = draw.choice(("orthogonal", "mica", "pissa", "pissa_niter_2", "olora", "eva"))
    if not root and draw.random() < 0.1:
        config["lora_bias"] = True
    if draw.random() < 0.05:
        config["use_dora"] = True
    return root, config


def save_trained(tensors: Tensors, root: str, settings: Mapping[str, Any], folder: Path, seed: int) -> None:
    """Has peft make an adapter of these settings, moves every trained value, and has peft save it.

    Raises what peft raises on settings that it does not take.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = get_peft_model(tree(tensors, root), LoraConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.05
    model.save_pretrained(folder)


def merged_by_peft(tensors: Tensors, root: str, folder: Path) -> dict[str, torch.Tensor]:
    """Official name -> fp32 values after peft has loaded the adapter on the base and merged it."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(tree(tensors, root), folder).merge_and_unload()
    return {f"{root}{name}": value.detach() for name, value in model.state_dict().items()}


def rewrite(folder: Path, config: Mapping[str, Any] | None = None, **tensors: torch.Tensor | None) -> None:
    """Changes keys of the config, and tensors of the weights (None removes one), of a saved adapter."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(config or {})))
    stored: dict[str, Any] = load_file(folder / "adapter_model.safetensors") | tensors
    save_file({k: v for k, v in stored.items() if v is not None}, folder / "adapter_model.safetensors")
