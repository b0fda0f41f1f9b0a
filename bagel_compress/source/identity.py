"""Identity of a checkpoint: one digest over all tensor values, the configs, the tokenizer and the VAE.

A tensor enters as the BLAKE3 of its bf16 values, under its official name, so that another packaging of the same weights
has the same identity, and any changed element gives another one. Configs enter as parsed JSON, so that formatting does
not count; tokenizer and VAE enter by their bytes. A build takes the same digests of the tensors while it encodes them,
so that it needs no second read to identify its source.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from bagel_compress.io.tensor_spec import TensorSpec

if TYPE_CHECKING:
    import numpy as np

CONFIGS = ("llm_config.json", "vit_config.json", "config.json")
FILES = (
    "ae.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json",
)  # fmt: skip
BLOCK = 1 << 22  # elements hashed at a time
THREADS = 4  # one thread hashes 3 to 8 GB/s; four use up the memory bandwidth
ReadWords = Callable[[str, int, int], "np.ndarray"]  # (tensor, start, stop) -> bf16 bits as uint16


def identity(
    specs: Iterable[TensorSpec],
    tensors: Mapping[str, str],
    configs: Mapping[str, Mapping[str, Any]],
    files: Mapping[str, str],
) -> str:
    """sha256 over `tensors` (BLAKE3 of each tensor's values), the configs, and `files` (BLAKE3 of those in FILES)."""
    total = hashlib.sha256(b"bagel-compress checkpoint 2\n")
    for name in CONFIGS:
        if name in configs:
            total.update(f"{name} {json.dumps(configs[name], sort_keys=True)}\n".encode())
    for spec in specs:
        total.update(f"{spec.name} {list(spec.shape)} {tensors[spec.name]}\n".encode())
    for name in FILES:
        if name in files:
            total.update(f"{name} {files[name]}\n".encode())
    return total.hexdigest()


def tensor_digests(specs: Iterable[TensorSpec], read: ReadWords) -> dict[str, str]:
    """Tensor name -> BLAKE3 of its bf16 values. Reads every element of every tensor."""

    def digest(spec: TensorSpec) -> str:
        total = blake3()
        for start in range(0, spec.numel, BLOCK):
            total.update(read(spec.name, start, min(start + BLOCK, spec.numel)).view("uint8").data)
        return total.hexdigest()

    specs = list(specs)
    with ThreadPoolExecutor(THREADS, "identity") as pool:
        return dict(zip((spec.name for spec in specs), pool.map(digest, specs), strict=True))
