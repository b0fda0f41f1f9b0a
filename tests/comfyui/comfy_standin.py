"""What the nodes use of ComfyUI, as small stand-ins: its books of memory, its bar, its folders, and its core nodes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image


class Interrupted(Exception):  # noqa: N818 - ComfyUI's is no error either
    """After the Cancel button."""


class ModelPatcher:
    """The attributes that ComfyUI's class sets, without what our subclass replaces."""

    def __init__(self, model: Any, load_device: Any, offload_device: Any, size: int = 0) -> None:
        self.model, self.load_device, self.offload_device, self.size = model, load_device, offload_device, size
        model.device, model.model_loaded_weight_memory = offload_device, 0


class Comfy:
    """One ComfyUI: what it did, and its modules in `sys.modules` while a test lasts."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.loaded: list[Any] = []
        self.steps: list[tuple[int, int]] = []
        self.previews: list[Image.Image] = []
        self.texts: list[str] = []
        self.cancel_at: int | None = None
        self.nodes: dict[str, type] = {}
        self.models: dict[str, tuple[Any, ...]] = {}  # what loaders gave: ComfyUI keeps it while their values stay
        for name in ("custom_nodes", "models/bagel", "input"):
            (folder / name).mkdir(parents=True)
        self.provide()

    def provide(self) -> None:
        device = torch.device("cpu")
        self.module(
            "comfy.model_management",
            get_torch_device=lambda: device,
            unet_offload_device=lambda: device,
            load_models_gpu=self.load,
            throw_exception_if_processing_interrupted=self.stop_if_asked,
        )
        self.module("comfy.model_patcher", ModelPatcher=ModelPatcher)
        self.module("comfy.utils", ProgressBar=lambda total: Bar(self, total))
        self.module("comfy.latent_formats", Flux=lambda: "flux")
        self.module("latent_preview", get_previewer=lambda device, form: Previewer() if form == "flux" else None)
        self.module("server", PromptServer=type("PromptServer", (), {"instance": self}))
        bagel: list[str] = []
        self.module(
            "folder_paths",
            models_dir=str(self.folder / "models"),
            add_model_folder_path=lambda kind, path: bagel.append(path) if path not in bagel else None,
            get_folder_paths=lambda kind: list(bagel),
        )

    def module(self, name: str, **attributes: Any) -> None:
        for path in [name.rpartition(".")[0], name]:
            if path and path not in sys.modules:
                self.monkeypatch.setitem(sys.modules, path, ModuleType(path))
        for key, value in attributes.items():
            setattr(sys.modules[name], key, value)
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, sys.modules[name])

    # --- what ComfyUI does --------------------------------------------------------------------------------------------

    def load(self, patchers: list[Any], memory_required: int = 0) -> None:
        for patcher in patchers:
            if patcher not in self.loaded:
                self.loaded.append(patcher)
            patcher.partially_load(patcher.load_device, 1e32)

    def unload_all(self) -> None:
        while self.loaded:
            patcher = self.loaded.pop()
            assert patcher.partially_unload(patcher.offload_device, 1e30) == 0
            patcher.detach(True)

    def stop_if_asked(self) -> None:
        if self.cancel_at is not None and self.steps and self.steps[-1][0] >= self.cancel_at:
            raise Interrupted

    def send_progress_text(self, text: str, node: str) -> None:
        self.texts.append(text)

    def start(self) -> dict[str, type]:
        """Loads every folder of custom_nodes in the way of ComfyUI's load_custom_node."""
        self.monkeypatch.setitem(sys.modules, "nodes", ModuleType("nodes"))
        sys.modules["nodes"].NODE_CLASS_MAPPINGS = self.nodes  # type: ignore[attr-defined]
        for package in ("bagel_compress.comfyui", "bagel_compress.comfyui.nodes"):
            self.monkeypatch.delitem(sys.modules, package, raising=False)
        for folder in sorted((self.folder / "custom_nodes").iterdir()):
            spec = importlib.util.spec_from_file_location(str(folder), folder / "__init__.py")
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            assert set(module.NODE_DISPLAY_NAME_MAPPINGS) == set(module.NODE_CLASS_MAPPINGS)
            self.nodes.update(module.NODE_CLASS_MAPPINGS)
        return self.nodes

    def run(self, workflow: Path, **changes: Any) -> dict[str, list[Any]]:
        """Executes a workflow that was saved by ComfyUI's page: type of an end node -> what came into each.

        `changes`: settings that get another value wherever a node has them.
        """
        flow = json.loads(workflow.read_text("utf-8"))
        links = {number: (source, slot) for number, source, slot, *_ in flow["links"]}
        outputs: dict[int, tuple[Any, ...]] = {}
        ends: dict[str, list[Any]] = {}
        for node in sorted(flow["nodes"], key=lambda node: node["order"]):
            came = {i["name"]: links[i["link"]] for i in node["inputs"] if i["link"] is not None}
            values = {name: outputs[source][slot] for name, (source, slot) in came.items()}
            if node["type"] == "LoadImage":
                outputs[node["id"]] = (to_image(self.folder / "input" / node["widgets_values"][0]),)
            elif not node["outputs"]:
                ends.setdefault(node["type"], []).append(*values.values())
            else:
                key = json.dumps(node["widgets_values"])
                kept = self.models.get(key) if node["outputs"][0]["type"] == "BAGEL_MODEL" else None
                outputs[node["id"]] = kept or self.call(node, values, changes)
                if node["outputs"][0]["type"] == "BAGEL_MODEL":
                    self.models[key] = outputs[node["id"]]
        return ends

    def call(self, node: dict[str, Any], values: dict[str, Any], changes: dict[str, Any]) -> tuple[Any, ...]:
        kind = self.nodes[node["type"]]
        inputs = kind.INPUT_TYPES()  # type: ignore[attr-defined]
        specs = inputs["required"] | inputs["optional"]
        written = list(node["widgets_values"])
        for name, (form, options) in specs.items():
            if form in ("BAGEL_MODEL", "IMAGE"):
                assert name in values or name in inputs["optional"]
                continue
            # a workflow that was saved before a setting existed: ComfyUI shows the setting with its default
            value = written.pop(0) if written else options["default"]
            value = changes.get(name, value)
            if name == "seed":
                assert written.pop(0) == "fixed"
            assert not isinstance(form, list) or value in form, (name, value)
            values[name] = value
        assert written == []
        hidden = {"node": str(node["id"])} if inputs.get("hidden") else {}
        result = getattr(kind(), kind.FUNCTION)(**values, **hidden)  # type: ignore[attr-defined]
        assert len(result) == len(kind.RETURN_TYPES) == len(node["outputs"])  # type: ignore[attr-defined]
        return tuple(result)


class Bar:
    def __init__(self, comfy: Comfy, total: int) -> None:
        self.comfy, self.total = comfy, total

    def update_absolute(self, value: int, total: int, preview: tuple[str, Image.Image, int] | None) -> None:
        self.comfy.steps.append((value, total))
        if preview is not None:
            self.comfy.previews.append(preview[1])


class Previewer:
    def decode_latent_to_preview_image(self, form: str, latent: torch.Tensor) -> tuple[str, Image.Image, int]:
        grey = ((latent[0, :3].mean(0) + 1) * 127).clamp(0, 255).byte().numpy()
        return form, Image.fromarray(grey), 512


def to_image(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).float()[None] / 255


def to_pixels(image: torch.Tensor) -> np.ndarray:
    """As ComfyUI's SaveImage writes them."""
    return np.clip(255.0 * image[0].numpy(), 0, 255).astype(np.uint8)
