"""LoRA: a trained product of two small matrices beside a linear that stays as it is, full precision or coded.

y = base(x) + B(A(dropout(x))) * alpha / rank, A from He's uniform distribution, B zero (Hu et al. 2021; initial values
as in peft). A and B are fp32 and are rounded to the dtype of x where they are multiplied. Files are peft's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from bagel.layout import expected_tensors, official_role
from bagel.loading import parameter_path, put
from bagel.model import Bagel
from bagel_compress.build.recipe import Match
from bagel_compress.errors import FinetuneError
from bagel_compress.finetune.config import LoraConfig
from bagel_compress.io.atomic import atomic_path, write_atomic
from bagel_compress.io.tensor_spec import TensorSpec
from bagel_compress.source.adapter import WEIGHTS
from bagel_compress.source.adapter_config import CONFIG, AdapterConfig

PREFIX = "base_model.model."


class LoraLinear(nn.Module):
    """A linear with an adapter. `base_layer` has `in_features` and `out_features`; its weight gets no gradient."""

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base_layer = base
        self.scale, self.dropout = scale, dropout
        rows, columns = int(base.out_features), int(base.in_features)  # type: ignore[arg-type]
        bound = 1 / math.sqrt(columns)
        down = torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(down)
        self.lora_B = nn.Parameter(torch.zeros(rows, rank))

    def place(self, device: torch.device) -> LoraLinear:
        """Moves A and B; the base stays where it was loaded."""
        for half in (self.lora_A, self.lora_B):
            half.data = half.data.to(device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        shown = functional.dropout(x, self.dropout, self.training) if self.dropout else x
        low = functional.linear(shown, self.lora_A.to(x.dtype))
        added: Tensor = self.base_layer(x) + functional.linear(low, self.lora_B.to(x.dtype)) * self.scale
        return added


def official_names(bagel: Bagel) -> dict[str, str]:
    """Path of a parameter in Bagel -> official tensor name, in the official order."""
    return {parameter_path(name): name for name in expected_tensors(bagel.config.sizes)}


def matched(names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], match: Sequence[Match]) -> list[str]:
    """Paths whose tensors any of the matches takes. Raises FinetuneError naming a match that takes none."""
    found: list[str] = []
    for one in match:
        took = [
            path
            for path, name in names.items()
            if one.takes(TensorSpec("BF16", shapes[name], name), official_role(name))
        ]
        if not took:
            raise FinetuneError(f"no tensor of this model is {one}; correct the match.")
        found += took
    return list(dict.fromkeys(found))


def add_adapters(bagel: Bagel, config: LoraConfig, seed: int, frozen: Collection[str] = ()) -> dict[str, LoraLinear]:
    """Puts an adapter on every matched linear and freezes everything else: official module name -> adapter.

    `frozen`: paths that get none. Raises FinetuneError if a match takes what is no linear, or if nothing is left.
    """
    bagel.requires_grad_(False)
    names = official_names(bagel)
    generator = torch.Generator().manual_seed(seed)
    adapters: dict[str, LoraLinear] = {}
    for path in matched(names, expected_tensors(bagel.config.sizes), config.match):
        name = names[path]
        if path in frozen:
            continue
        if official_role(name).kind not in ("linear", "head"):
            raise FinetuneError(f"lora: {name} is no linear; add kind: linear to the match.")
        place = path.removesuffix(".weight")
        adapter = LoraLinear(
            bagel.get_submodule(place), config.rank, config.alpha / config.rank, config.dropout, generator
        )
        put(bagel, place, adapter.place(bagel.device))
        adapters[name.removesuffix(".weight")] = adapter
    if not adapters:
        raise FinetuneError("freeze, visual_und and visual_gen leave no linear that lora matches; widen its match.")
    return adapters


def parameters_of(adapters: Mapping[str, LoraLinear]) -> dict[str, nn.Parameter]:
    """peft's names of the trained tensors -> the tensors."""
    return {
        f"{PREFIX}{name}.{half}.weight": getattr(adapter, half)
        for name, adapter in adapters.items()
        for half in ("lora_A", "lora_B")
    }


def save_adapter(folder: Path, values: Mapping[str, Tensor], config: LoraConfig, base: str) -> None:
    """adapter_model.safetensors and adapter_config.json as peft writes them. `base`: public name of the base model."""
    modules = sorted({name.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for name in values})
    settings: dict[str, Any] = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": base, "inference_mode": True,
        "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout, "bias": "none",
        "target_modules": modules, "fan_in_fan_out": False, "init_lora_weights": True, "use_rslora": False,
        "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / WEIGHTS) as partial:
        save_file({n: t.detach().cpu().contiguous() for n, t in values.items()}, partial, metadata={"format": "pt"})
    write_atomic(folder / CONFIG, json.dumps(settings, indent=2) + "\n")


def attach(bagel: Bagel, folder: str | Path) -> None:
    """Puts a saved adapter on a model that is loaded, without merging it: the way to run one over a coded base.

    Takes adapters that `save_adapter` wrote, and others of the same kind (LoRA of linears under official names).
    Raises CheckpointError if the config cannot be followed, FinetuneError if the adapter is not for this model.
    """
    folder = Path(folder)
    settings = AdapterConfig.read(folder)
    stored = load_file(folder / WEIGHTS)
    names = {name.removesuffix(".weight"): path.removesuffix(".weight") for path, name in official_names(bagel).items()}
    generator = torch.Generator().manual_seed(0)
    for key in [k for k in stored if k.endswith(".lora_A.weight")]:
        module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        down, up = stored[key], stored.get(key.replace("lora_A", "lora_B"))
        if module not in names or up is None:
            raise FinetuneError(f"{folder / WEIGHTS} adapts {module}, which this model does not have.")
        rank = down.shape[0]
        base = bagel.get_submodule(names[module])
        if (up.shape[0], down.shape[1]) != (base.out_features, base.in_features):
            raise FinetuneError(
                f"{folder / WEIGHTS}: the LoRA of {module} is {list(up.shape)} x {list(down.shape)}, the linear is"
                f" {base.out_features} x {base.in_features}."
            )
        adapter = LoraLinear(base, rank, settings.scale(module, rank), 0.0, generator)
        with torch.no_grad():
            adapter.lora_A.copy_(down)
            adapter.lora_B.copy_(up)
        put(bagel, names[module], adapter.place(bagel.device).requires_grad_(False).eval())
