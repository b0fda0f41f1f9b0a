"""Which other loaders open a format, and how that is known: what `inspect --loaders` and the model card show.

A rule whose `proof` is empty was read in the loader's source and never run. `result` is what happens: "opens" (all of
the artifact, or each weight of it), "fails" (with an error), or "wrong": it opens, without an error, to another model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Loader:
    """One loader and one format."""

    name: str
    version: str  # the oldest that was tried or read
    result: Literal["opens", "fails", "wrong"]
    gpus: str  # where its kernels run
    note: str
    proof: str = ""  # the test that shows it, "tests/file.py::function"


ACCELERATE = Loader(
    "accelerate", "1.0", "wrong", "-",
    "load_checkpoint_and_dispatch takes the codes for weights and only warns of unused scales",
)  # fmt: skip
MIXED = Loader(
    "vLLM and others", "-", "fails", "-",
    "several formats in one artifact have no common reader: config.json names a method that none of them knows",
)  # fmt: skip
TWO_STAGES = Loader(
    "vLLM-Omni 0.30, two stages", "0.30", "wrong", "-",
    "the thinker builds the generation expert without a quantisation config and skips its scales in silence",
)  # fmt: skip
OURS = (
    Loader(
        "ComfyUI, nodes of bagel-compress", "0.3.64", "opens", "any", "the build's folder in models/bagel",
        "tests/comfyui/test_nodes.py::test_builds_of_several_formats_open",
    ),
    Loader(
        "official BAGEL code", "2025-10", "opens", "any", "the build's folder, by bagel_compress.interop",
        "tests/pipeline/test_interop.py::test_the_official_model_computes_with_what_is_stored",
    ),
)  # fmt: skip
DECODED = Loader(
    "ComfyUI-BAGEL, 2026 rewrite", "1.0", "opens", "any", "the file of `bagel-compress comfyui --bf16`: 16 bits again",
    "tests/pipeline/test_comfy.py::test_any_build_decodes_to_the_same_file",
)  # fmt: skip
UNSERVED = "it reads the VAE from the files of the index and wants a preprocessor_config.json: `serve` in the recipe"
SERVED = Loader(
    "vLLM-Omni, one stage", "0.30", "opens", "see docs/serving.md",
    "its config, quantisation config and weight iterator take the folder; it has not drawn from it, that needs a GPU",
    "tests/pipeline/test_served.py::test_vllm_omni_takes_the_folder",
)  # fmt: skip
RAW = (
    Loader("accelerate", "1.0", "opens", "any", "load_checkpoint_and_dispatch of the official code"),
    Loader("vLLM-Omni, one stage", "0.30", "fails", "-", UNSERVED),
    Loader(
        "ComfyUI-BAGEL, 2026 rewrite", "1.0", "opens", "any", "the file of `bagel-compress comfyui`",
        "tests/pipeline/test_comfy.py::test_a_file_without_codes_names_its_model",
    ),
)  # fmt: skip


def compressed_tensors(gpus: str) -> Loader:
    proof = "tests/pipeline/test_other_loaders.py::test_compressed_tensors_reads_every_layer_of_nano"
    return Loader("compressed-tensors", "0.20", "opens", gpus, "each weight, by its compressor", proof)


def comfyui(gpus: str) -> Loader:
    proof = "tests/pipeline/test_other_loaders.py::test_comfy_kitchen_reads_every_layer_of_nano"
    return Loader("ComfyUI (comfy-kitchen)", "0.2.40", "opens", gpus, "the file of `bagel-compress comfyui`", proof)


def bitsandbytes(gpus: str, proof: str) -> Loader:
    return Loader("bitsandbytes", "0.50", "opens", gpus, "each weight, into its own modules", proof)


def vllm_omni(note: str = UNSERVED) -> Loader:
    return Loader("vLLM-Omni, one stage", "0.30", "fails", "-", note)
