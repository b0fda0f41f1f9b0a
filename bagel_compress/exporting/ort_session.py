"""ONNX Runtime sessions of an export folder. A session is opened when it is first used. No torch.

Every run uses IO binding, on CPU and on CUDA: rows and caches leave a block as device values and enter the next one
without a copy. und_layer and gen_layer read the same bytes of one data file, but each session keeps its own copy of the
understanding expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bagel_compress.errors import ExportError, MissingExtraError
from bagel_compress.exporting.manifest import ExportFolder

if TYPE_CHECKING:
    import onnxruntime as ort

Value = Any  # onnxruntime.OrtValue
# Precision -> ONNX element type (onnx.proto, TensorProto.DataType), so that running needs no onnx package.
ELEMENT_TYPES = {"fp32": 1, "fp16": 10, "bf16": 16}
# MatMulAddFusion merges MatMul and bias before DequantizeLinear can be fused with MatMul; the matrix would then be
# dequantised in every pass.
DISABLED_OPTIMIZERS = ["MatMulAddFusion"]
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class Sessions:
    """Runs the graphs of a folder by block name (a `Runner`)."""

    def __init__(self, folder: ExportFolder, provider: str | None = None, threads: int = 0) -> None:
        """`provider` is "cpu" or "cuda", by default that of the export.

        `threads` is the size of the thread pool that all sessions of the process share, 0 for one per core; onnxruntime
        creates the pool once, so only the first value counts. Raises MissingExtraError without onnxruntime, ExportError
        if the provider is not available or cannot compute in the export's precision.
        """
        try:
            import onnxruntime
        except ImportError:
            raise MissingExtraError("running an export needs onnxruntime; install bagel-compress[onnx].") from None
        self._ort: Any = onnxruntime
        self.folder = folder
        self.device = provider or folder.manifest.settings.provider
        self._check_provider()
        self._sessions: dict[str, ort.InferenceSession] = {}
        _share_threads(threads)

    def _check_provider(self) -> None:
        settings = self.folder.manifest.settings
        if PROVIDERS[self.device] not in self._ort.get_available_providers():
            raise ExportError(
                f"onnxruntime here has no {PROVIDERS[self.device]};"
                " install bagel-compress[onnx-gpu] in place of [onnx]."
            )
        if self.device == "cpu" and settings.precision == "bf16":
            raise ExportError(
                "this export is bf16, which onnxruntime cannot compute on CPU; export with precision fp32, or use CUDA."
            )

    def value(self, array: NDArray[Any]) -> Value:
        """Copies a numpy array (fp32 or int64) to the device."""
        return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.device, 0)

    def empty(self, shape: tuple[int, ...]) -> Value:
        """A device value in the export's precision, with an axis of length 0."""
        kind = ELEMENT_TYPES[self.folder.manifest.settings.precision]
        return self._ort.OrtValue.ortvalue_from_shape_and_type(list(shape), kind, self.device, 0)

    def run(self, block: str, inputs: Mapping[str, Value | NDArray[Any]]) -> list[Value]:
        """Runs a block on named inputs; returns its outputs in order. Raises ExportError if the runtime fails."""
        session = self.session(block)
        binding = session.io_binding()
        for name, value in inputs.items():
            on_device = self.value(value) if isinstance(value, np.ndarray) else value
            binding.bind_ortvalue_input(name, on_device)
        for port in self.folder.manifest.blocks[block].outputs:
            binding.bind_output(port.name, self.device, 0)
        try:
            session.run_with_iobinding(binding)
        except self._failures() as error:
            raise ExportError(f"block {block}: onnxruntime failed ({_first_line(error)}).") from None
        return list(binding.get_outputs())

    def session(self, block: str) -> ort.InferenceSession:
        """The session of a block, opened at the first call. Raises ExportError if the runtime rejects the graph."""
        if block not in self._sessions:
            entry = self.folder.manifest.blocks[block]
            options = self.session_options()
            self.folder.file(entry.data)
            path = str(self.folder.file(entry.model))
            try:
                self._sessions[block] = self._ort.InferenceSession(
                    path, options, providers=[PROVIDERS[self.device]], disabled_optimizers=DISABLED_OPTIMIZERS
                )
            except self._failures() as error:
                raise ExportError(
                    f"block {block}: onnxruntime {self._ort.__version__} on {self.device} rejects {entry.model}"
                    f" ({_first_line(error)}); export for another precision or runtime."
                ) from None
        return self._sessions[block]

    def session_options(self) -> ort.SessionOptions:
        options = self._ort.SessionOptions()
        options.use_per_session_threads = False
        options.log_severity_level = 3
        # Precision of activations in products with int4 weights: 1 is fp32, 4 (onnxruntime's default) is int8.
        level = "1" if self.folder.manifest.settings.activations == "float" else "4"
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
        return options

    def _failures(self) -> tuple[type[Exception], ...]:
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "RuntimeException",
                 "NoSuchFile", "EPFail", "ModelLoadCanceled", "EngineError", "NoModel", "ModelLoaded")  # fmt: skip
        return tuple(getattr(state, name) for name in names if hasattr(state, name))


_THREADS: list[int] = []  # size of this process's thread pool, once it was created


def _share_threads(threads: int) -> None:
    if not _THREADS:
        import onnxruntime

        onnxruntime.set_global_thread_pool_sizes(threads, 1)
        _THREADS.append(threads)


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
