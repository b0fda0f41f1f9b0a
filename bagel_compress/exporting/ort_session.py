"""ONNX Runtime sessions of an export folder: opened when first used, values stay on the device. No torch.

Every run goes through IO binding, on CPU and on CUDA alike: rows and caches leave a block as device values and enter
the next one untouched. und_layer and gen_layer read the same bytes of one data file, but each session keeps its own
copy of the understanding expert.
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
# ONNX element types (onnx.proto, TensorProto.DataType) by precision; onnx itself is not needed to run.
ELEMENT_TYPES = {"fp32": 1, "fp16": 10, "bf16": 16}
# It joins MatMul and bias before codes are fused into the product; the matrix is then unpacked in every pass.
HARMFUL = ["MatMulAddFusion"]
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class Sessions:
    """The graphs of a folder as functions from named values to named values."""

    def __init__(self, folder: ExportFolder, provider: str | None = None, threads: int = 0) -> None:
        """`threads`: of the pool that all sessions share, 0 for one per core. Raises MissingExtraError, ExportError."""
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
        """A numpy array (fp32 or int64) on the device."""
        return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.device, 0)

    def empty(self, shape: tuple[int, ...]) -> Value:
        """A value of the export's precision with an axis of length 0."""
        kind = ELEMENT_TYPES[self.folder.manifest.settings.precision]
        return self._ort.OrtValue.ortvalue_from_shape_and_type(list(shape), kind, self.device, 0)

    def run(self, block: str, inputs: Mapping[str, Value | NDArray[Any]]) -> list[Value]:
        """Runs a block. Raises ExportError, naming the block, if the runtime refuses it."""
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
        """The session of a block, made when first asked for."""
        if block not in self._sessions:
            entry = self.folder.manifest.blocks[block]
            options = self.session_options()
            self.folder.file(entry.data)
            path = str(self.folder.file(entry.model))
            try:
                self._sessions[block] = self._ort.InferenceSession(
                    path, options, providers=[PROVIDERS[self.device]], disabled_optimizers=HARMFUL
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
        # onnxruntime's own default is 4, rows of 8 bits; 1 is fp32.
        level = "1" if self.folder.manifest.settings.activations == "float" else "4"
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
        return options

    def _failures(self) -> tuple[type[Exception], ...]:
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "RuntimeException",
                 "NoSuchFile", "EPFail", "ModelLoadCanceled", "EngineError", "NoModel", "ModelLoaded")  # fmt: skip
        return tuple(getattr(state, name) for name in names if hasattr(state, name))


_THREADS: list[int] = []  # size of the pool that this process made; onnxruntime makes one once


def _share_threads(threads: int) -> None:
    if not _THREADS:
        import onnxruntime

        onnxruntime.set_global_thread_pool_sizes(threads, 1)
        _THREADS.append(threads)


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
