"""Runs TensorRT engines with the interface of ONNX Runtime's sessions, so that the same passes and sampler use both.

Device memory is allocated by torch. The engines of und_layer and of gen_layer both hold the understanding expert, and
no pass uses both kinds, so only the kind in use is kept on the GPU. The module is written against TensorRT's documented
API; docs/export.md says which parts have not been run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bagel_compress.errors import ExportError
from bagel_compress.exporting.manifest import ExportFolder, PortEntry
from bagel_compress.exporting.profiles import check_shapes
from bagel_compress.exporting.tensorrt import load_tensorrt
from bagel_compress.run.export_settings import TORCH_NAMES

EXCLUSIVE = ("und_layer", "gen_layer")  # kinds of which only one is kept on the GPU at a time


@dataclass(frozen=True)
class DeviceValue:
    """A tensor on the GPU with the method `numpy` of ONNX Runtime's values."""

    tensor: torch.Tensor

    def numpy(self) -> NDArray[Any]:
        return self.tensor.float().cpu().numpy() if self.tensor.is_floating_point() else self.tensor.cpu().numpy()


class Engines:
    """Runs the engines of a folder by block name (a `Runner`)."""

    def __init__(self, folder: ExportFolder) -> None:
        """Raises MissingExtraError without the package, ExportError without a GPU or without engines."""
        self.folder = folder
        settings = folder.manifest.settings
        if settings.runtime == "onnxruntime":
            raise ExportError(f"{folder.path} was exported for onnxruntime and holds no engines; run it there.")
        self._trt = load_tensorrt(settings.runtime)
        if not torch.cuda.is_available():
            raise ExportError(f"{folder.path} holds TensorRT engines, which need an NVIDIA GPU; none was found here.")
        self._dtype: torch.dtype = getattr(torch, TORCH_NAMES[settings.precision])
        self._runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.WARNING))
        self._loaded: dict[str, tuple[Any, Any]] = {}

    def value(self, array: NDArray[Any]) -> DeviceValue:
        return DeviceValue(torch.from_numpy(np.ascontiguousarray(array)).cuda())

    def empty(self, shape: tuple[int, ...]) -> DeviceValue:
        return DeviceValue(torch.empty(shape, dtype=self._dtype, device="cuda"))

    def run(self, block: str, inputs: Mapping[str, Any]) -> list[DeviceValue]:
        """Runs a block on named inputs; returns its outputs in order.

        Raises ExportError, naming block and axis, if an input has a size that the engine was not built for.
        """
        entry = self.folder.manifest.blocks[block]
        tensors = {n: (self.value(v) if isinstance(v, np.ndarray) else v).tensor for n, v in inputs.items()}
        check_shapes(block, entry, self.folder.manifest.axes, {n: t.shape for n, t in tensors.items()})
        _, context = self._engine(block)
        for name, tensor in tensors.items():
            context.set_input_shape(name, tuple(tensor.shape))
            # An empty tensor has the address 0, which TensorRT does not accept.
            context.set_tensor_address(name, tensor.contiguous().data_ptr() or self._placeholder.data_ptr())
        outputs = [self._output(context, port) for port in entry.outputs]
        stream = torch.cuda.current_stream()
        if not context.execute_async_v3(stream.cuda_stream):
            raise ExportError(f"block {block}: TensorRT failed to run it; see its log above.")
        stream.synchronize()
        return outputs

    def _output(self, context: Any, port: PortEntry) -> DeviceValue:
        dtype = self._dtype if port.dtype == "float" else getattr(torch, port.dtype)
        tensor = torch.empty(tuple(context.get_tensor_shape(port.name)), dtype=dtype, device="cuda")
        context.set_tensor_address(port.name, tensor.data_ptr())
        return DeviceValue(tensor)

    @property
    def _placeholder(self) -> torch.Tensor:
        if not hasattr(self, "_byte"):
            self._byte = torch.zeros(256, dtype=torch.uint8, device="cuda")
        return self._byte

    def _engine(self, block: str) -> tuple[Any, Any]:
        if block not in self._loaded:
            self._unload_other_kind(self.folder.manifest.blocks[block].kind)
            data = self.folder.file(self.folder.manifest.blocks[block].engine).read_bytes()
            engine = self._runtime.deserialize_cuda_engine(data)
            if engine is None:
                raise ExportError(
                    f"block {block}: this GPU or TensorRT {self._trt.__version__} cannot load the engine;"
                    " export again for this GPU with the installed version."
                )
            self._loaded[block] = (engine, engine.create_execution_context())
        return self._loaded[block]

    def _unload_other_kind(self, kind: str) -> None:
        if kind in EXCLUSIVE:
            kinds = {b: self.folder.manifest.blocks[b].kind for b in self._loaded}
            self._loaded = {b: e for b, e in self._loaded.items() if kinds[b] == kind or kinds[b] not in EXCLUSIVE}
