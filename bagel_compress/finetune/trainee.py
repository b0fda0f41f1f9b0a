"""What a run trains: a model opened for it, with its trained tensors by the names under which they are saved."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bagel.layout import expected_tensors, official_role
from bagel.loading import load_vae, parameter_path, put, read_config_files, unfilled
from bagel.model import Bagel
from bagel.sampler import Sampler
from bagel.text import TextCodec
from bagel.training import Losses, PackedBatch, forward
from bagel_compress.build.manifest import MANIFEST
from bagel_compress.build.recipe import Match
from bagel_compress.codecs.linears import CodedLinear
from bagel_compress.errors import FinetuneError
from bagel_compress.finetune.config import FinetuneConfig
from bagel_compress.finetune.lora import LoraLinear, add_adapters, matched, official_names, parameters_of
from bagel_compress.finetune.processes import Processes, fill
from bagel_compress.run.load import downloaded, load_checkpoint, open_model
from bagel_compress.source.checkpoint import Checkpoint

# What has no gradient when one side is not trained.
UND_ONLY = (Match.model_validate({"component": ["vit", "connector"]}),)
GEN_ONLY = (
    Match.model_validate({"component": "llm", "expert": "gen"}),
    Match.model_validate({"component": ["latent", "time"]}),
)


class Network(nn.Module):
    """The training forward as a module: FSDP gathers parameters when it is called."""

    def __init__(self, bagel: Bagel, recompute: bool) -> None:
        super().__init__()
        self.bagel, self.recompute = bagel, recompute

    def forward(self, batch: PackedBatch, noise: Tensor) -> Losses:
        return forward(self.bagel, batch, noise, self.recompute)


@dataclass(frozen=True)
class Trainee:
    """`trained`: tensors by name, peft's for adapters, official ones otherwise."""

    sampler: Sampler
    network: nn.Module  # gives Losses of what a batch's `inputs` are
    trained: dict[str, nn.Parameter]
    adapters: dict[str, LoraLinear]
    base: str  # public name of the model
    checkpoint: Checkpoint | None = None  # whose files a full fine-tuning saves beside its weights

    @property
    def bagel(self) -> Bagel:
        return self.sampler.bagel

    def weights(self) -> dict[str, nn.Parameter]:
        """All parameters of a model that is trained whole, by official name."""
        parameters = dict(self.bagel.named_parameters())
        return {name: parameters[path] for path, name in official_names(self.bagel).items()}


def open_trainee(config: FinetuneConfig, processes: Processes) -> Trainee:
    """Opens the model of a run and marks what is trained.

    Raises FinetuneError if nothing is, or if weights that are stored in codes are to be trained.
    """
    dtype = getattr(torch, config.dtype)
    folder = Path(config.model) if Path(config.model).exists() else downloaded(config.model)
    if config.lora is not None:
        return _with_adapters(config, folder, dtype, processes)
    if (folder / MANIFEST).exists():
        raise FinetuneError(f"{config.model} is a compressed artifact, whose weights stay as they are; train a lora.")
    return _with_all_weights(config, Checkpoint.open(folder, config.base), dtype, processes)


def _with_adapters(config: FinetuneConfig, folder: Path, dtype: torch.dtype, processes: Processes) -> Trainee:
    assert config.lora is not None
    if (folder / MANIFEST).exists():
        sampler = open_model(folder, processes.device)
        if dtype != torch.bfloat16:
            compute_in(sampler.bagel, dtype, config.model)
    else:
        sampler = load_checkpoint(Checkpoint.open(folder, config.base), processes.device, dtype)
    _shift(sampler, config)
    adapters = add_adapters(sampler.bagel, config.lora, config.seed, set(_frozen(config, sampler.bagel)))
    trained = parameters_of(adapters)
    for adapter in adapters.values():
        adapter.train()
    return Trainee(sampler, Network(sampler.bagel, config.recompute), trained, adapters, config.model)


def _with_all_weights(
    config: FinetuneConfig, checkpoint: Checkpoint, dtype: torch.dtype, processes: Processes
) -> Trainee:
    """Sharded where there are several processes. Every process reads every tensor and keeps its part."""
    if processes.mesh is None and dtype != torch.float32:
        raise FinetuneError(
            "all weights are trained as fp32 masters that FSDP2 casts to bfloat16: start with torchrun (one process"
            " will do), or set dtype: float32."
        )
    vae_shapes = {name: tensor.shape for name, tensor in checkpoint.vae.tensors.items()}
    model_config, vae_config = read_config_files(checkpoint.files, checkpoint.shapes, vae_shapes)
    with unfilled():
        bagel = Bagel(model_config)
    names = official_names(bagel)
    frozen = set(_frozen(config, bagel))
    for path, parameter in bagel.named_parameters():
        parameter.requires_grad_(path not in frozen and official_role(names[path]).kind != "position")
    network = Network(bagel, config.recompute)
    if processes.mesh is not None:
        processes.shard(network, bagel.layers, dtype)
        network.to_empty(device=processes.device)
    else:
        for path, parameter in list(bagel.named_parameters()):
            values = torch.empty(parameter.shape, device=processes.device)
            put(bagel, path, nn.Parameter(values, requires_grad=parameter.requires_grad))
    parameters = dict(bagel.named_parameters())
    for spec in checkpoint.specs:
        values = checkpoint.read(spec, 0, spec.numel).reshape(spec.shape)
        fill(parameters[parameter_path(spec.name)], values.to(processes.device, torch.float32, copy=True))
    vae_file = checkpoint.files["ae.safetensors"]
    vae = load_vae(vae_file.parent, processes.device, vae_file, vae_config)
    text = TextCodec.from_files(checkpoint.files, checkpoint.files["llm_config.json"].parent)
    sampler = Sampler(bagel.train(), vae, text)
    _shift(sampler, config)
    trained = {names[path]: p for path, p in parameters.items() if p.requires_grad}
    if not trained:
        raise FinetuneError("freeze takes every weight, so nothing is trained; free some.")
    return Trainee(sampler, network, trained, {}, config.model, checkpoint)


def compute_in(model: nn.Module, dtype: torch.dtype, name: str) -> None:
    """Widens what is stored in bf16; codes stay codes, and are decoded to `dtype` where they are multiplied.

    Raises FinetuneError if a kernel or a module of the model computes in bf16 alone.
    """
    for path, module in model.named_modules():
        if isinstance(module, CodedLinear):
            if module.kernel is not None:
                raise FinetuneError(
                    f"{name}: {module.kernel} multiplies {path} in bfloat16; leave dtype away, or train on the CPU."
                )
            module.computes_in = dtype
        elif not isinstance(module, nn.Linear) and hasattr(module, "describe"):
            raise FinetuneError(f"{name}: {path} ({type(module).__name__}) computes in bfloat16; leave dtype away.")
    model.to(dtype)


def _frozen(config: FinetuneConfig, bagel: Bagel) -> list[str]:
    """Paths of what is not trained."""
    match = [*config.freeze]
    match += [] if config.visual_und else UND_ONLY
    match += [] if config.visual_gen else GEN_ONLY
    return matched(official_names(bagel), expected_tensors(bagel.config.sizes), match)


def _shift(sampler: Sampler, config: FinetuneConfig) -> None:
    """The run's timestep shift in place of the model's."""
    sampler.bagel.config = replace(sampler.bagel.config, timestep_shift=config.timestep_shift)
