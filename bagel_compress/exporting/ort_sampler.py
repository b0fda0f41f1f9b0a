"""The sampler on exported graphs: the loops of bagel.loops on ONNX Runtime and numpy. No torch.

    sampler = open_onnx("out/bagel-onnx")
    sampler.run(["a red cat"], size=(1024, 1024), seed=1).image

It has the calls, settings, seeds and results of bagel.sampler.Sampler, with numpy arrays in place of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image

from bagel.branches import Noise
from bagel.images import resized
from bagel.loops import Loops
from bagel.settings import FlowSettings, TextSettings
from bagel.text import FILES as TOKENIZER
from bagel.text import TextCodec
from bagel_compress.errors import ExportError
from bagel_compress.exporting import ort_arrays as arrays
from bagel_compress.exporting.manifest import ExportFolder
from bagel_compress.exporting.ort_arrays import Floats
from bagel_compress.exporting.ort_model import GraphModel, Runner
from bagel_compress.exporting.ort_session import Sessions
from bagel_compress.run.export_settings import BlockKind


def open_onnx(path: str | Path, provider: str | None = None, threads: int = 0, trust: bool = False) -> GraphSampler:
    """Opens the sampler of an export folder.

    `provider` is "cpu" or "cuda", by default that of the target; `threads` is the size of the CPU thread pool, 0 for
    one per core. Both are ignored for TensorRT engines. With `trust`, files are not compared with
    their digests. Raises ArtifactError if the folder is not a complete export,
    MissingExtraError without the runtime's package, ExportError if the provider cannot run this export.
    """
    folder = ExportFolder.open(path, trust=trust)
    if folder.manifest.settings.runtime != "onnxruntime":
        from bagel_compress.exporting.trt_runner import Engines

        return GraphSampler(folder, Engines(folder))
    return GraphSampler(folder, Sessions(folder, provider, threads))


class GraphSampler(Loops):
    """An exported model with its VAE and tokenizer."""

    def __init__(self, folder: ExportFolder, runner: Runner) -> None:
        """Raises ExportError if the folder lacks some of the model's blocks."""
        missing = set(get_args(BlockKind)) - {entry.kind for entry in folder.manifest.blocks.values()}
        if missing:
            raise ExportError(
                f"{folder.path} is not a complete model: it has no {min(missing)}; export for a target without"
                " `blocks`."
            )
        self.folder, self._runner = folder, runner
        self.bagel: GraphModel = GraphModel(folder.manifest.model, runner)
        files = {name: folder.file(name) for name in TOKENIZER if name in folder.manifest.files}
        self.text = TextCodec.from_files(files, folder.path)

    # --- randomness ---------------------------------------------------------------------------------------------------

    def generator(self, seed: int) -> arrays.Generator:
        return arrays.Generator(seed)

    def normal(self, shape: tuple[int, ...], generator: arrays.Generator) -> Floats:
        return generator.normal(shape)

    def choose(self, logits_BV: Floats, settings: TextSettings, generators: Sequence[arrays.Generator]) -> list[int]:
        return [arrays.choose(row, settings, g) for row, g in zip(logits_BV, generators, strict=True)]

    # --- flow ---------------------------------------------------------------------------------------------------------

    def schedule(self, flow: FlowSettings) -> Floats:
        return arrays.schedule(flow.num_timesteps, flow.timestep_shift)

    def joined(self, parts: Sequence[Any]) -> Floats:
        return np.concatenate(parts)

    def start(self, x: Any) -> Floats:
        return np.asarray(x, dtype=np.float32)

    def guide(self, v: Floats, v_text: Floats, v_image: Floats | None, flow: FlowSettings) -> Floats:
        return arrays.guide(v, v_text, v_image, flow)

    def euler(self, x: Floats, v: Floats, dt: Any) -> Floats:
        return x - v * dt  # type: ignore[no-any-return]

    # --- pictures -----------------------------------------------------------------------------------------------------

    def pixels(self, image: Image.Image) -> Floats:
        return arrays.to_pixels(image)

    def encode(self, image: Image.Image, noise: Noise) -> Floats:
        pixels = arrays.to_pixels(resized(image, self.bagel.config.vae_rule))[None]
        factor, z = self.bagel.config.vae_downsample, self.bagel.config.latent_channels
        draw = np.asarray(noise((1, z, pixels.shape[2] // factor, pixels.shape[3] // factor)), dtype=np.float32)
        [latent] = self._runner.run("vae_encoder", {"image": pixels, "noise": draw})
        return latent.numpy()[0]  # type: ignore[no-any-return]

    def picture(self, packed: Floats, grid: tuple[int, int]) -> Image.Image:
        return arrays.to_picture(self.decode(self.bagel.unpack_latent(packed, *grid)))

    def decode(self, latent_CHW: Floats) -> Floats:
        """VAE latent -> image [3, H, W], nominal range [-1, 1]."""
        [image] = self._runner.run("vae_decoder", {"latent": latent_CHW[None]})
        return image.numpy()[0]  # type: ignore[no-any-return]


__all__: Sequence[str] = ["GraphSampler", "open_onnx"]
