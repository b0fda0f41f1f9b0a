"""The model's passes over exported graphs: the counterpart of bagel.model.Bagel and bagel.context. No torch.

A context holds tuples of device values that are never modified: appending makes new ones, so a fork copies references
only. The rows of an image block are ordered differently than in Bagel (wrapper rows first). This changes no result,
since all rows of a block share one rope position and see each other, and later rows see all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bagel.config import BagelConfig
from bagel_compress.exporting.ort_arrays import Floats, grid_ids, patchify, rope_tables, unpatchify

Value = Any
Tap = Callable[[str, Any], None]


class Runner(Protocol):
    """Runs blocks, with ONNX Runtime sessions or TensorRT engines."""

    def run(self, block: str, inputs: dict[str, Any]) -> list[Value]:
        """Runs a block on named inputs (device values or numpy arrays) and returns its outputs in order."""

    def value(self, array: NDArray[Any]) -> Value:
        """Copies a numpy array to the device."""

    def empty(self, shape: tuple[int, ...]) -> Value:
        """A device value in the export's precision, with an axis of length 0."""


@dataclass
class Cache:
    """One sample's keys and values per layer. `length` counts cached rows, `rope` is the next position."""

    layers: tuple[tuple[Value, Value], ...]
    length: int = 0
    rope: int = 0

    def fork(self) -> Cache:
        """An independent cache with the same content. Device values are shared, not copied."""
        return Cache(self.layers, self.length, self.rope)

    def append(self, layers: Sequence[tuple[Value, Value]], count: int, rope_step: int) -> None:
        """Replaces keys and values by the longer ones that a pass returned, which has added `count` rows."""
        self.layers, self.length, self.rope = tuple(layers), self.length + count, self.rope + rope_step


@dataclass(frozen=True)
class NoisyRows:
    """The input of one denoising pass, shared by the guidance branches: per sample, wrapper rows and latent rows."""

    wrappers: Value
    latents: tuple[Value, ...]
    lens: tuple[int, ...]


class GraphModel:
    """Bagel's passes on exported graphs. A graph takes one sequence, so the samples of a batch run one by one."""

    def __init__(self, config: BagelConfig, runner: Runner) -> None:
        self.config, self._run = config, runner.run
        self._runner = runner

    def new_context(self) -> Cache:
        llm = self.config.llm
        empty = self._runner.empty((1, llm.num_kv_heads, 0, llm.head_dim))
        return Cache(((empty, empty),) * llm.num_layers)

    # --- passes that fill contexts ------------------------------------------------------------------------------------

    def prefill_text(self, contexts: Sequence[Cache], ids: Sequence[Sequence[int]], tap: Tap | None = None) -> None:
        """Appends one text turn (already wrapped) to each context: causal, rope advances by the number of tokens."""
        for context, turn in zip(contexts, ids, strict=True):
            self._read(context, self._embed(turn), np.arange(context.rope, context.rope + len(turn)), True, tap)

    def prefill_vit(
        self, contexts: Sequence[Cache], images: Sequence[Floats], wrap: tuple[int, int], tap: Tap | None = None
    ) -> None:
        """Appends one image as ViT features to each context; all its rows share one rope position."""
        patch, side = self.config.vit.patch_size, self.config.vit_max_patches
        for context, image in zip(contexts, images, strict=True):
            grid = image.shape[1] // patch, image.shape[2] // patch
            ids = grid_ids(*grid, side, self.config.interpolate_pos)
            feeds = {"patches": patchify(image, patch), "ids": ids, "wrappers": self._embed(wrap)}
            [rows] = self._run("vit", feeds)
            self._read(context, rows, np.full(grid[0] * grid[1] + 2, context.rope), False, tap)

    def prefill_latent(
        self, contexts: Sequence[Cache], latents: Sequence[Floats], wrap: tuple[int, int], tap: Tap | None = None
    ) -> None:
        """Appends one clean image as VAE latent [z, h, w] to each context (t = 0)."""
        patch = self.config.latent_patch_size
        for context, latent in zip(contexts, latents, strict=True):
            grid = latent.shape[1] // patch, latent.shape[2] // patch
            block = self.noisy_block(patchify(latent, patch), np.float32(0), [grid], wrap)
            _, layers = self._image_pass(block.wrappers, block.latents[0], context, tap)
            context.append(layers, grid[0] * grid[1] + 2, 1)

    def next_logits(self, contexts: Sequence[Cache], tokens: Sequence[int]) -> Floats:
        """Appends one token to each context and returns the logits [B, V] of what follows."""
        rows = []
        for context, token in zip(contexts, tokens, strict=True):
            h = self._read(context, self._embed([token]), np.array([context.rope]), True, None)
            rows.append(self._run("lm_head", {"x": h})[0].numpy())
        return np.concatenate(rows)

    # --- images -------------------------------------------------------------------------------------------------------

    def noisy_block(
        self,
        packed: Floats,
        t: Any,
        grids: Sequence[tuple[int, int]],
        wrap: tuple[int, int],
        tap: Tap | None = None,
    ) -> NoisyRows:
        """Rows of packed latent tokens [N, p*p*z] at time t; `grids` are (rows, cols) per sample."""
        latents, start = [], 0
        for rows, cols in grids:
            ids = grid_ids(rows, cols, self.config.max_latent_size, self.config.interpolate_pos)
            part = np.ascontiguousarray(packed[start : start + len(ids)], dtype=np.float32)
            feeds = {"latents": part, "t": np.array([t], np.float32), "ids": ids}
            latents.append(self._run("latent_in", feeds)[0])
            start += len(ids)
        return NoisyRows(self._embed(wrap), tuple(latents), tuple(r * c for r, c in grids))

    def velocity(self, block: NoisyRows, contexts: Sequence[Cache], tap: Tap | None = None) -> Floats:
        """Predicted noise - data of every latent token, [N, p*p*z]. Contexts are read, not changed."""
        found = []
        for context, latents in zip(contexts, block.latents, strict=True):
            rows, _ = self._image_pass(block.wrappers, latents, context, tap)
            found.append(self._run("latent_out", {"x": rows})[0].numpy())
        return np.concatenate(found)

    def pack_latent(self, latent_CHW: Floats) -> Floats:
        """[z, h, w] -> [tokens, p*p*z]."""
        return patchify(latent_CHW, self.config.latent_patch_size)

    def unpack_latent(self, packed: Floats, rows: int, cols: int) -> Floats:
        """Inverse of `pack_latent`."""
        return unpatchify(packed, rows, cols, self.config.latent_patch_size)

    # --- passes over all layers ---------------------------------------------------------------------------------------

    def _embed(self, ids: Sequence[int]) -> Value:
        return self._run("embed", {"ids": np.array(ids, np.int64)})[0]

    def _read(self, context: Cache, x: Value, positions: NDArray[Any], text: bool, tap: Tap | None) -> Value:
        """Runs all layers on rows of the understanding expert and appends them to the context.

        With `text`, attention is causal and every row advances the rope position; without, the rows are an image's:
        each sees all others, and together they take one position. Returns the rows after the last layer.
        """
        count = len(positions)
        every = context.length + count
        visible = np.arange(context.length + 1, every + 1) if text else np.full(count, every)
        feeds = self._rope(positions) | {"visible": self._runner.value(visible.astype(np.int64))}
        layers = []
        for index, (past_k, past_v) in enumerate(context.layers):
            feeds |= {"x": x, "past_k": past_k, "past_v": past_v}
            x, keys, values = self._run(f"und_layer_{index:02}", feeds)
            layers.append((keys, values))
            if tap:
                tap(f"layer{index}", x.numpy())
        context.append(layers, count, count if text else 1)
        return x

    def _image_pass(
        self, wrappers: Value, latents: Value, context: Cache, tap: Tap | None
    ) -> tuple[Value, list[tuple[Value, Value]]]:
        """Runs all layers on one image block. Returns its latent rows, and keys and values with the block's added."""
        feeds, layers = self._rope(np.array([context.rope])), []
        for index, (past_k, past_v) in enumerate(context.layers):
            feeds |= {"wrappers": wrappers, "latents": latents, "past_k": past_k, "past_v": past_v}
            wrappers, latents, keys, values = self._run(f"gen_layer_{index:02}", feeds)
            layers.append((keys, values))
            if tap:
                start, stop = np.split(wrappers.numpy(), 2)
                tap(f"layer{index}", np.concatenate([start, latents.numpy(), stop]))
        return latents, layers

    def _rope(self, positions: NDArray[Any]) -> dict[str, Value]:
        llm = self.config.llm
        cos, sin = rope_tables(positions, llm.head_dim, llm.rope_theta)
        return {"cos": self._runner.value(cos), "sin": self._runner.value(sin)}
