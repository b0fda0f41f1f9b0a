"""Builds engines from the ONNX files, one per block, with TensorRT for RTX (needs no GPU) or classic TensorRT.

A TensorRT for RTX engine runs on all compute capabilities that it was built for; kernels are compiled on the user's
GPU. A successful build shows that TensorRT accepts every operator, type and shape; results can only be checked on a
GPU, or by running the same graph in ONNX Runtime. Two builds of one engine differ in some bytes.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bagel_compress.codecs.base import Codec
from bagel_compress.errors import ExportError, MissingExtraError
from bagel_compress.exporting.manifest import BlockEntry
from bagel_compress.exporting.profiles import profile
from bagel_compress.run.export_settings import ExportSettings, Range

MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
EXTRAS = {"tensorrt-rtx": "bagel-compress[tensorrt]", "tensorrt": "NVIDIA's tensorrt package"}
# Compute capabilities that TensorRT for RTX 1.7 builds for (its ComputeCapability enum); bf16 needs at least 8.0.
CAPABILITIES = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
BF16_FROM = 80
# Matches node names in TensorRT's log, as the module `graph` gives them: node_add_7, or gen.o_proj after a weight.
# Names of TensorRT's source files (x.cpp, x.h) do not match.
NODE = re.compile(r"\b(node_\w+|[a-z]\w*(?:\.(?!cpp\b|h\b)\w+)+)")


@dataclass(frozen=True, slots=True)
class Engine:
    """A serialised engine, and the builder's warnings and errors."""

    data: bytes
    log: tuple[str, ...]


def check_settings(settings: ExportSettings, codecs: Iterable[Codec]) -> None:
    """Raises ExportError if a compute capability is unknown, or does not support the precision or one of the codecs."""
    newest = max(codecs, key=lambda codec: codec.least_capability, default=None)
    for name in settings.capabilities:
        if name not in CAPABILITIES:
            raise ExportError(f"capability {name} is unknown to tensorrt-rtx; it builds for {', '.join(CAPABILITIES)}.")
        number = int(name.removeprefix("sm"))
        if settings.precision == "bf16" and number < BF16_FROM:
            raise ExportError(
                f"{name} has no bf16, which needs sm{BF16_FROM} or later; choose precision fp16 or drop {name}."
            )
        if newest is not None and number < newest.least_capability:
            raise ExportError(
                f"{name} has no {newest.format}, which needs sm{newest.least_capability} or later; use int8 weights or"
                f" drop {name}."
            )


def build_engine(
    block: str, entry: BlockEntry, model: Path, settings: ExportSettings, axes: Mapping[str, Range]
) -> Engine:
    """Builds the engine of one block. Raises ExportError naming block and node, MissingExtraError without TensorRT."""
    trt = load_tensorrt(settings.runtime)
    log: list[str] = []
    builder, config, network = _parsed(trt, block, entry, model, _logger(trt, log), settings)
    _add_profile(trt, builder, config, entry, axes)
    data = builder.build_serialized_network(network, config)
    if data is None:
        raise ExportError(_failure(block, log, settings))
    return Engine(bytes(data), tuple(log))


def load_tensorrt(runtime: str) -> Any:
    """The Python package of a runtime ("tensorrt-rtx" or "tensorrt"). Raises MissingExtraError if it is missing."""
    try:
        return importlib.import_module(MODULES[runtime])
    except ImportError:
        raise MissingExtraError(f"runtime {runtime} needs {MODULES[runtime]}; install {EXTRAS[runtime]}.") from None


def _parsed(
    trt: Any, block: str, entry: BlockEntry, model: Path, logger: Any, settings: ExportSettings
) -> tuple[Any, Any, Any]:
    builder = trt.Builder(logger)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(model)):
        error = parser.get_error(0)
        raise ExportError(
            f"block {block}: {settings.runtime} {trt.__version__} rejects node {error.node_name() or '?'}"
            f" ({error.node_operator() or '?'}): {_short(error.desc())}; {_advice(entry)}"
        )
    config = builder.create_builder_config()
    if settings.capabilities:
        config.num_compute_capabilities = len(settings.capabilities)
        for index, name in enumerate(settings.capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, name.upper()), index)
    return builder, config, network


def _add_profile(trt: Any, builder: Any, config: Any, entry: BlockEntry, axes: Mapping[str, Range]) -> None:
    shapes = profile(entry, axes)
    if shapes:
        made = builder.create_optimization_profile()
        for name, (low, usual, high) in shapes.items():
            made.set_shape(name, low, usual, high)
        config.add_optimization_profile(made)


def _logger(trt: Any, log: list[str]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.WARNING:
                log.append(f"{str(severity).rpartition('.')[2].lower()}: {message}")

    return Logger()


def _failure(block: str, log: Sequence[str], settings: ExportSettings) -> str:
    errors = [line for line in log if line.startswith(("error", "internal_error"))]
    reason = _short(errors[0]) if errors else "no reason given"
    node = next((m[1] for line in errors if (m := NODE.search(line))), "?")
    return (
        f"block {block}: {settings.runtime} cannot build it, at node {node} ({reason});"
        " choose another precision or fewer capabilities."
    )


def _advice(entry: BlockEntry) -> str:
    if "bnb4" in entry.forms:
        return "compress with int4 in place of nf4."
    return "export this block for onnxruntime."


def _short(text: str) -> str:
    return " ".join(text.split())[:240]
