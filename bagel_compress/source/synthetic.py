"""Writes a synthetic checkpoint: random weights in the names and shapes of a real model, streamed to disk.

It serves benchmarks, memory and latency checks (which do not depend on the values), and trying the tool without
downloading 29 GB. Every value is a function of (seed, tensor, position), so the bytes depend neither on the number of
threads nor on the chunk size.

To a codec the matrices look trained: normal values times log-normal row and column scales (sigma 0.35 and 0.25), and
0.2 % of outliers, six times as large. Their bf16 exponents then have 2.7 bits of entropy; the released weights' have
about 2.65. Norms are near 1, sin-cos tables are the real ones. Pictures drawn with such weights are noise.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from math import isqrt
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from bagel.config import BagelConfig
from bagel.layout import ModelSizes, expected_tensors, official_role
from bagel_compress.errors import CheckpointError
from bagel_compress.io.atomic import PARTIAL, atomic_file, write_atomic
from bagel_compress.io.byte_size import size_text
from bagel_compress.io.packaged import FULL_CONFIGS, SMALL_CONFIGS
from bagel_compress.io.safetensors_file import lay_out
from bagel_compress.io.tensor_spec import PartSpec, TensorSpec
from bagel_compress.source.released_header import full_sizes

if TYPE_CHECKING:
    import numpy as np

    from bagel.vae import VAEConfig

ROW_SIGMA, COLUMN_SIGMA = 0.35, 0.25  # of the log-normal scales
CHUNK = 1 << 22  # elements made and written at a time
TABLE_BITS = 12  # log2 of the intervals in the table of the inverse normal distribution
# Standard deviations: of norm weights around 1; of biases, embeddings and learned tables around 0.
NORM_SPREAD, SMALL = 0.1, 0.02
# A decoder large enough to time, 0.24 billion weights in both experts; heads of the released width.
MEDIUM = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 8,
          "num_key_value_heads": 2}  # fmt: skip
MEDIUM_SIDE = 32  # latent rows and columns: pictures of 512 x 512
Progress = Callable[[int], object]


def synthesise(shape: str, out: Path, seed: int, layers: int | None = None, progress: Progress | None = None) -> int:
    """Writes `ema.safetensors`, `ae.safetensors`, configs and a tokenizer into `out`.

    `shape` is "7b-mot" (the released model), "medium" or "tiny"; `layers` is the number of decoder layers, by default
    the shape's own. `progress` is called with the bytes of each write. Returns the tensor bytes of `ema.safetensors`.
    Raises CheckpointError if the folder is not empty or the disk is too small.
    """
    if layers is not None and layers < 1:
        raise CheckpointError(f"--layers is {layers}; a model has at least 1 decoder layer.")
    sizes, vae, configs = _full(layers) if shape == "7b-mot" else _small(shape, layers)
    specs = {name: PartSpec("BF16", dims) for name, dims in expected_tensors(sizes).items()}
    vae_specs = {name: PartSpec("F32", dims) for name, dims in vae_shapes(vae).items()}
    _prepare(out, sum(spec.nbytes for spec in (*specs.values(), *vae_specs.values())))
    for name, config in configs.items():
        write_atomic(out / name, json.dumps(config, indent=2) + "\n")
    _write_tokenizer(out, sizes.vocab)
    _write(out / "ae.safetensors", vae_specs, seed, lambda done: None)
    _write(out / "ema.safetensors", specs, seed, progress or (lambda done: None))
    return sum(spec.nbytes for spec in specs.values())


def _full(layers: int | None) -> tuple[ModelSizes, VAEConfig, dict[str, dict[str, Any]]]:
    from bagel.vae import VAEConfig

    llm, vit = (json.loads((FULL_CONFIGS / f"{name}_config.json").read_text("utf-8")) for name in ("llm", "vit"))
    return full_sizes(layers), VAEConfig(), _configs(llm, vit, {}, full_sizes(layers))


def _small(shape: str, layers: int | None) -> tuple[ModelSizes, VAEConfig, dict[str, dict[str, Any]]]:
    """The model of the tests, three layers of width 64; "medium" has the same ViT and VAE and MEDIUM's decoder."""
    from bagel.vae import VAEConfig

    config = json.loads((SMALL_CONFIGS / "config.json").read_text("utf-8"))
    llm, vit = config["llm_config"], config["vit_config"]
    if shape == "medium":
        llm, config = llm | MEDIUM, config | {"max_latent_size": MEDIUM_SIDE}
    if layers is not None:
        llm = llm | {"num_hidden_layers": layers}
    vae = VAEConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1)
    sizes = BagelConfig.from_mappings(llm, vit, config, {}, vae.z_channels, vae.downsample).sizes
    return sizes, vae, _configs(llm, vit, config, sizes)


def _configs(
    llm: dict[str, Any], vit: dict[str, Any], extra: dict[str, Any], sizes: ModelSizes
) -> dict[str, dict[str, Any]]:
    """The JSON files by name; token ids are those of the small tokenizer."""
    llm = llm | {"num_hidden_layers": sizes.layers, "bos_token_id": 560, "eos_token_id": 562}
    config = {"architectures": ["BagelForConditionalGeneration"], "model_type": "bagel"} | extra
    config |= {
        "max_latent_size": isqrt(sizes.latent_rows),
        "vit_max_num_patch_per_side": isqrt(sizes.vit_rows),
        "llm_config": llm,
        "vit_config": vit,
    }
    return {
        "llm_config.json": llm,
        "vit_config.json": vit,
        "config.json": config,
        "generation_config.json": {"bos_token_id": 560, "eos_token_id": [562, 560], "pad_token_id": 560},
    }


def vae_shapes(config: VAEConfig) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of the autoencoder."""
    import torch

    from bagel.vae import AutoEncoder

    with torch.device("meta"):
        state = AutoEncoder(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _prepare(out: Path, nbytes: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    others = [path.name for path in out.iterdir() if not path.name.endswith(PARTIAL)]
    if others:
        raise CheckpointError(
            f"{out} is not empty ({sorted(others)[0]}); choose a new folder for the synthetic checkpoint."
        )
    free = shutil.disk_usage(out).free
    if free < nbytes:
        raise CheckpointError(f"{out} needs {size_text(nbytes)}, its disk has {size_text(free)} free; choose another.")


def _write_tokenizer(out: Path, vocab: int) -> None:
    """Writes the small tokenizer, its vocabulary padded to the rows of the embedding, so that any id can be decoded.

    The special tokens are entries of the vocabulary too. Some tokenizer libraries take the id of an added token from
    there, or else append the token after all entries, and would give it another id than the file says. Raises
    CheckpointError if the files disagree on an id.
    """
    from bagel.errors import BagelError
    from bagel.text import TextCodec

    folder = SMALL_CONFIGS
    for name in ("merges.txt", "tokenizer_config.json"):
        shutil.copyfile(folder / name, out / name)
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    ids = json.loads((folder / "vocab.json").read_text("utf-8"))
    ids |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    ids |= {f"pad{i}": i for i in range(max(ids.values()) + 1, vocab)}
    tokenizer["model"]["vocab"] = ids
    for name, data in (("tokenizer.json", tokenizer), ("vocab.json", ids)):
        write_atomic(out / name, json.dumps(data, ensure_ascii=False))
    try:
        TextCodec.from_dir(out)
    except BagelError as error:
        raise CheckpointError(str(error)) from None


def _write(path: Path, specs: Mapping[str, PartSpec], seed: int, progress: Progress) -> None:
    """Writes one file from front to back; all cores make the next chunks, in reused buffers, while one is written."""
    import numpy as np

    header, offsets = lay_out(specs)
    workers = os.cpu_count() or 1
    free = [np.empty(CHUNK, np.uint16) for _ in range(workers + 1)]
    ahead: deque[tuple[np.ndarray, Future[np.ndarray]]] = deque()

    def write_first() -> None:
        buffer, made = ahead.popleft()
        progress(file.write(made.result().data))
        free.append(buffer)

    with atomic_file(path) as file, ThreadPoolExecutor(workers) as pool:
        file.write(header)
        for name in sorted(specs, key=offsets.__getitem__):
            spec = TensorSpec(specs[name].dtype, specs[name].shape, name)
            make = _tensor(spec, seed)
            for start in range(0, spec.numel, CHUNK):
                if not free:
                    write_first()
                buffer = free.pop()
                out = buffer[: min(CHUNK, spec.numel - start)]
                ahead.append((buffer, pool.submit(make, start, out)))
        while ahead:
            write_first()


def _tensor(spec: TensorSpec, seed: int) -> Callable[[int, np.ndarray], np.ndarray]:
    """A function (start, out) that fills `out`, uint16, with the bf16 bits of the tensor's elements from `start` on.

    It returns the array to store: `out` itself, or for an F32 tensor its values as uint32 bits of fp32.
    """
    import numpy as np

    from bagel_compress.source.synthetic_kernel import fill

    role = official_role(spec.name)
    key = zlib.crc32(spec.name.encode()) << 32 | (seed & 0xFFFFFFFF)
    if spec.name.endswith("pos_embed.pos_embed"):
        return _sin_cos(*spec.shape)
    matrix = role.kind in ("linear", "head", "conv")
    columns = spec.numel // spec.shape[0] if matrix else 1
    spread = float(columns) ** -0.5 if matrix else NORM_SPREAD if role.kind == "norm" else SMALL
    one = role.kind == "norm" and spec.name.endswith("weight")
    scales = _log_normal(columns if matrix else 1, key ^ 0x5BD1E995, COLUMN_SIGMA if matrix else 0.0) * np.float32(
        spread
    )
    rows = _log_normal(spec.shape[0] if matrix else 1, key ^ 0x2545F491, ROW_SIGMA if matrix else 0.0)
    table = _normal_table()

    def make(start: int, out: np.ndarray) -> np.ndarray:
        fill(out, start, np.uint64(key), table, rows, scales, columns, np.float32(one), matrix)
        return out if spec.dtype == "BF16" else out.astype(np.uint32) << 16

    return make


def _log_normal(count: int, key: int, sigma: float) -> np.ndarray:
    """exp(sigma * normal), in steps of 2^-12 so that no system's `exp` can change a bit of the weights."""
    import numpy as np

    generator = np.random.Generator(np.random.Philox(key=key))
    return (np.round(np.exp(sigma * generator.standard_normal(count)) * 4096) / 4096).astype(np.float32)


@cache
def _normal_table() -> np.ndarray:
    """Inverse of the normal distribution at the bounds of 4096 equally likely intervals; the ends are -4.5 and 4.5."""
    import numpy as np

    count = 1 << TABLE_BITS
    inner = [NormalDist().inv_cdf(i / count) for i in range(1, count)]
    return np.round(np.array([-4.5, *inner, 4.5]), 6).astype(np.float32)


def _sin_cos(rows: int, width: int) -> Callable[[int, np.ndarray], np.ndarray]:
    """The fixed position table: first half the column, second half the row; each half sines then cosines.

    position * 10000^(-k / (width / 4)), k = 0 .. width / 4 - 1 (the formula of MAE's 2-D sin-cos embedding).
    """
    import numpy as np

    from bagel_compress.io.bf16 import rounded

    side = isqrt(rows)
    angles = np.outer(np.arange(side), 10000.0 ** (-np.arange(width // 4) / (width / 4)))
    half = rounded(np.concatenate([np.sin(angles), np.cos(angles)], 1).astype(np.float32).reshape(-1)).reshape(side, -1)
    cells = np.arange(rows)
    table = np.concatenate([half[cells % side], half[cells // side]], 1).reshape(-1)
    return lambda start, out: table[start : start + out.size]
