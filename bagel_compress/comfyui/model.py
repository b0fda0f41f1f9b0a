"""What a BAGEL_MODEL socket carries: a folder, and its sampler while ComfyUI lets it be in memory.

ComfyUI keeps the books of device memory. A model is entered there as a patcher (comfy.model_patcher.ModelPatcher);
before a node computes, ComfyUI makes room and asks the patcher to load, and later it may ask it to leave. A BAGEL model
leaves by being dropped whole: its weights are read again from the mapped file when they are next needed, which costs
less than a second copy in host memory.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bagel.sampler import Sampler

# Contexts, activations and scratch memory beside the weights, in bytes. DFloat11's card: 21.76 GB at the peak of a
# 1024x1024 picture, 19.89 GB of weights.
WORKING_SET = 2_000_000_000


class Weights:
    """The model that ComfyUI counts: nothing, or a sampler."""

    def __init__(self, folder: Path, target: str | None) -> None:
        self.folder, self.target = folder, target
        self.sampler: Sampler | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the folder's weights: what the whole model holds on the device."""
        return sum(file.stat().st_size for file in self.folder.rglob("*.safetensors"))

    def open(self, device: Any) -> None:
        """Reads the weights; with a target, places them as it says."""
        from bagel_compress.run.load import open_model

        if self.target is None:
            self.sampler = open_model(self.folder, device)
            return
        from bagel_compress.run.offload import place
        from bagel_compress.run.target import Target

        target = Target.load(self.target)
        sampler = open_model(self.folder, "cpu")
        place(sampler, target, device)
        self.sampler = sampler

    def drop(self) -> None:
        """Gives the memory back."""
        self.sampler = None
        gc.collect()  # a model that is placed by a target has hooks that refer to it


@dataclass(frozen=True, slots=True)
class BagelModel:
    """A model that nodes hand on. `patcher` is how ComfyUI knows its weights."""

    weights: Weights
    patcher: Any

    @classmethod
    def enter(cls, folder: Path, target: str | None) -> BagelModel:
        """Enters a model into ComfyUI's books. Nothing is read yet."""
        import comfy.model_management as management

        weights = Weights(folder, target)
        device, host = management.get_torch_device(), management.unet_offload_device()
        return cls(weights, _patcher_class()(weights, device, host, size=weights.nbytes))

    def sampler(self) -> Sampler:
        """The sampler, on ComfyUI's device, after ComfyUI made room for it. Do not keep it."""
        import comfy.model_management as management

        management.load_models_gpu([self.patcher], memory_required=WORKING_SET)
        assert self.weights.sampler is not None
        return self.weights.sampler


@cache
def _patcher_class() -> Any:
    """The subclass of ComfyUI's ModelPatcher; made when ComfyUI is there."""
    from comfy.model_patcher import ModelPatcher

    class WholePatcher(ModelPatcher):
        """A model that is in memory whole or not at all."""

        def partially_load(self, device_to: Any, extra_memory: Any = 0, force_patch_weights: bool = False) -> int:
            """Bytes that were loaded: all, or 0 if they are there."""
            if self.model.sampler is not None:
                return 0
            self.model.open(device_to)
            self.model.device, self.model.model_loaded_weight_memory = device_to, self.size
            return int(self.size)

        def partially_unload(self, device_to: Any, memory_to_free: Any = 0, *args: Any, **options: Any) -> int:
            """0: no part can leave alone; ComfyUI then detaches the model."""
            return 0

        def detach(self, unpatch_all: bool = True) -> Any:
            """Leaves memory. `unpatch_all` is false where ComfyUI only forgets an entry of its books."""
            if unpatch_all:
                self.model.drop()
                self.model.device, self.model.model_loaded_weight_memory = self.offload_device, 0
            return self.model

    return WholePatcher
