"""An exported model with the interface of the torch sampler, so that validation runs the same code on both.

Every pass converts tensors to arrays and back; nothing is computed here. To draw pictures, use `GraphSampler` itself:
it is faster and needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bagel.branches import Noise
from bagel.flow import FlowSettings
from bagel.sampler import Sampler
from bagel_compress.exporting.ort_model import Cache, GraphModel, NoisyRows, Tap
from bagel_compress.exporting.ort_sampler import GraphSampler


class TorchAdapter(Sampler):
    """A GraphSampler that takes and returns torch tensors."""

    def __init__(self, sampler: GraphSampler) -> None:
        self.graphs = sampler
        self.bagel: Any = _Model(sampler.bagel)
        self.text = sampler.text

    def encode(self, image: Image.Image, noise: Noise) -> Tensor:
        return _tensor(self.graphs.encode(image, lambda shape: noise(shape).numpy()))

    def picture(self, packed: Tensor, grid: tuple[int, int]) -> Image.Image:
        return self.graphs.picture(packed.float().numpy(), grid)

    def guide(self, v: Tensor, v_text: Tensor, v_image: Tensor | None, flow: FlowSettings) -> Tensor:
        arrays = [None if x is None else x.numpy() for x in (v, v_text, v_image)]
        return _tensor(self.graphs.guide(arrays[0], arrays[1], arrays[2], flow))  # type: ignore[arg-type]


class _Model:
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, model: GraphModel) -> None:
        self._model, self.config, self.new_context = model, model.config, model.new_context

    def prefill_text(self, contexts: Sequence[Cache], ids: Sequence[Sequence[int]], tap: Tap | None = None) -> None:
        self._model.prefill_text(contexts, ids, _tapped(tap))

    def prefill_vit(self, contexts: Sequence[Cache], images: Sequence[Tensor], wrap: Any, tap: Any = None) -> None:
        self._model.prefill_vit(contexts, [i.numpy() for i in images], wrap, _tapped(tap))

    def prefill_latent(self, contexts: Sequence[Cache], latents: Sequence[Tensor], wrap: Any, tap: Any = None) -> None:
        self._model.prefill_latent(contexts, [x.float().numpy() for x in latents], wrap, _tapped(tap))

    def next_logits(self, contexts: Sequence[Cache], tokens: Sequence[int]) -> Tensor:
        return _tensor(self._model.next_logits(contexts, tokens))

    def noisy_block(
        self, packed: Tensor, t: Tensor, grids: Sequence[tuple[int, int]], wrap: tuple[int, int], tap: Any = None
    ) -> NoisyRows:
        return self._model.noisy_block(packed.numpy(), np.float32(t), grids, wrap)

    def velocity(self, block: NoisyRows, contexts: Sequence[Cache], tap: Tap | None = None) -> Tensor:
        return _tensor(self._model.velocity(block, contexts, _tapped(tap)))


def _tapped(tap: Tap | None) -> Tap | None:
    return None if tap is None else lambda name, rows: tap(name, _tensor(rows))


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
