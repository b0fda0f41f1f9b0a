"""One full-size decoder layer as ONNX and as TensorRT engines, beside the torch bf16 layer.

    python benchmarks/bench_export.py [--quick] [--tokens 1] [--variants int4]

Prints a line per variant, then one JSON line: export seconds and memory of the layer, the shortest pass of `gen_layer`
at 1 and 1024 latent tokens (and two wrapper rows) as a ratio to torch bf16, engine build seconds and sizes. Weights are
random, of the released shape. A ratio is of the best of some rounds in turn; long passes get as many as fit into
SECONDS.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bagel.config import BagelConfig, LLMConfig, ViTConfig
from bagel.layers import attention, rope_table
from bagel.mot import MoTLayer
from bagel.vae import VAEConfig
from bagel_compress.build.manifest import SourceEntry
from bagel_compress.build.recipe import Limits, parse_codec
from bagel_compress.codecs.base import Codec, Unit
from bagel_compress.exporting.build import export
from bagel_compress.exporting.manifest import ExportFolder, ExportSource
from bagel_compress.exporting.ort_session import Sessions
from bagel_compress.exporting.source import EncodedTensor, WeightSource
from bagel_compress.exporting.tensorrt import build_engine
from bagel_compress.io.tensor_spec import TensorSpec
from bagel_compress.run.target import Target

LLM = LLMConfig(3584, 18944, 1, 28, 4, 152064)
CONFIG = BagelConfig(LLM, ViTConfig(1152, 4304, 1, 16), 2, 16, 64, 70)
ROUNDS = 9
TOKENS = (1, 1024)
PAUSE = 0.25  # between passes: threads of the other library that wait for work keep its cores busy for a while
SECONDS = 12.0  # of all rounds of one ratio, once two are done
VARIANTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("fp32", "raw", {"precision": "fp32"}),
    ("fp16", "raw", {"precision": "fp16"}),
    ("int8", "int8", {"activations": "blocks"}),
    ("int8 dynamic", "int8", {"activations": "dynamic"}),
    ("int4", "int4", {"activations": "blocks"}),
    ("nf4", "nf4", {}),
)
ENGINES = (("bf16", "raw"), ("fp8", "fp8"), ("int8", "int8"), ("int4", "int4"))


class OneLayer(WeightSource):
    """A random layer of the released shape; codes are made once per codec."""

    limits = Limits.model_validate({})
    vae, files = None, {}  # type: ignore[assignment]

    def __init__(self, layer: MoTLayer, codec: Codec) -> None:
        self._codec = codec
        origin = SourceEntry(name="one layer", revision="", digest="", data_blake3="")
        self.identity = ExportSource(kind="checkpoint", name="one layer", digest=codec.format, checkpoint=origin)
        self._tensors = {f"layers.0.{name}": p.data for name, p in layer.named_parameters()}
        self._coded: dict[str, EncodedTensor] = {}

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {n: TensorSpec("BF16", tuple(t.shape), n) for n, t in self._tensors.items()}

    @property
    def official(self) -> dict[str, str]:  # type: ignore[override]
        return {name: name for name in self._tensors}

    def codec(self, path: str) -> Codec:
        return self._codec if self._tensors[path].ndim == 2 else parse_codec("raw")

    def encoded(self, path: str) -> EncodedTensor:
        if path not in self._coded:
            spec = self.specs[path]
            parts = self._codec.encode(Unit(path, (spec,)), {path: self._tensors[path]})
            self._coded[path] = EncodedTensor(spec, self._codec, parts)
        return self._coded[path]

    def _decoded(self, official: str) -> torch.Tensor:
        return self._tensors[official]

    def copy_files(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)

    def configs(self, folder: Path) -> tuple[BagelConfig, VAEConfig]:
        return CONFIG, VAEConfig()


def target(**settings: Any) -> Target:
    blocks = {"blocks": ("und_layer", "gen_layer")}
    return Target.model_validate(
        {"name": "bench", "device": {"name": "x", "memory_mib": 1}, "export": settings | blocks}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="ONNX and TensorRT of one full-size layer")
    parser.add_argument("--quick", action="store_true", help="no engines, three rounds")
    parser.add_argument("--variants", nargs="*", choices=[v[0] for v in VARIANTS], help="only these of ONNX Runtime")
    parser.add_argument("--no-engines", action="store_true")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help="latent tokens of the timed passes")
    args = parser.parse_args()
    rounds = 3 if args.quick else ROUNDS
    layer = random_layer()
    out = Path(tempfile.mkdtemp(prefix="bench-export-"))
    wanted = [v for v in VARIANTS if args.variants is None or v[0] in args.variants]
    try:
        result: dict[str, Any] = {"onnx": {}, "engines": {}}
        for name, codec, settings in wanted:
            result["onnx"][name] = measure_onnx(layer, codec, settings, out / "onnx", args.tokens, rounds)
            print(name, result["onnx"][name], flush=True)
        for name, codec in () if args.quick or args.no_engines else ENGINES:
            result["engines"][name] = measure_engine(layer, codec, out / "engine")
            print(name, result["engines"][name], flush=True)
    finally:
        shutil.rmtree(out)
    print(json.dumps({"benchmark": "export", "cpu": cpu_name(), "threads": torch.get_num_threads(), **result}))


def random_layer() -> MoTLayer:
    torch.manual_seed(0)
    with torch.device("meta"):
        layer = MoTLayer(LLM, 0)
    layer = layer.to(torch.bfloat16).to_empty(device="cpu").requires_grad_(False)
    for name, parameter in layer.named_parameters():
        parameter.fill_(1.0) if "norm" in name else parameter.normal_(0, 0.02)
    return layer


# --- ONNX Runtime beside torch ----------------------------------------------------------------------------------------


def torch_pass(layer: MoTLayer, tokens: int) -> Callable[[], object]:
    """The torch bf16 layer with all rows in the generation expert but two, as in denoising."""

    def attend(_: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention([q], [k], [v], causal=False)

    rows = torch.randn(2 + tokens, LLM.hidden_size).bfloat16()
    rope = rope_table(torch.zeros(len(rows)), LLM.head_dim, LLM.rope_theta, torch.bfloat16)
    return lambda: layer(rows, 2, rope, attend, True)


def measure_onnx(
    layer: MoTLayer, codec: str, settings: dict[str, Any], out: Path, lengths: list[int], rounds: int
) -> dict[str, float]:
    source = OneLayer(layer, parse_codec(codec))
    if codec != "raw":
        for path, spec in source.specs.items():
            if len(spec.shape) == 2:
                source.encoded(path)  # quantising is not the export's time
    before = anonymous_gb()
    cpu = time.process_time()
    folder, took, peak = exported(source, settings, out)
    cpu = time.process_time() - cpu
    sessions = Sessions(folder, threads=torch.get_num_threads())
    sessions.session("gen_layer_00")
    row = {"export_s": round(took, 2), "export_cpu_s": round(cpu, 2), "export_gb": round(peak - before, 2)}
    row["disk_gb"] = round(disk_gb(folder), 3)
    for tokens in lengths:
        feeds = layer_inputs(tokens, settings.get("precision", "fp32") == "fp16")
        mine, torchs = best_of(
            lambda f=feeds: sessions.run("gen_layer_00", f),  # type: ignore[misc]
            torch_pass(layer, tokens),
            rounds,
        )
        row |= {f"ratio_{tokens}": round(mine / torchs, 3), f"torch_s_{tokens}": round(torchs, 4)}
    shutil.rmtree(out)
    return row


def exported(source: WeightSource, settings: dict[str, Any], out: Path) -> tuple[ExportFolder, float, float]:
    """The folder, seconds, and the highest anonymous memory on the way, in GB."""
    peaks, stop = [anonymous_gb()], threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            peaks.append(anonymous_gb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    try:
        folder = export(source, target(**settings), out)
    finally:
        stop.set()
        watcher.join()
    return folder, time.perf_counter() - begun, max(peaks)


def layer_inputs(tokens: int, half: bool) -> dict[str, np.ndarray]:
    kind = np.float16 if half else np.float32
    random = np.random.default_rng(0)
    empty = np.zeros((1, LLM.num_kv_heads, 0, LLM.head_dim), kind)
    return {
        "wrappers": random.standard_normal((2, LLM.hidden_size)).astype(kind),
        "latents": random.standard_normal((tokens, LLM.hidden_size)).astype(kind),
        "cos": np.ones((1, 1, LLM.head_dim // 2), np.float32),
        "sin": np.zeros((1, 1, LLM.head_dim // 2), np.float32),
        "past_k": empty,
        "past_v": empty,
    }


# --- engines ----------------------------------------------------------------------------------------------------------


def measure_engine(layer: MoTLayer, codec: str, out: Path) -> dict[str, Any]:
    """Seconds and megabytes of the engine of gen_layer; the reason where TensorRT is not installed or refuses."""
    try:
        import tensorrt_rtx  # noqa: F401
    except ImportError:
        return {"skipped": "tensorrt_rtx is not installed"}
    settings = {"precision": "bf16"}
    folder = export(OneLayer(layer, parse_codec(codec)), target(**settings), out)
    entry = folder.manifest.blocks["gen_layer_00"]
    rtx = target(runtime="tensorrt-rtx", precision="bf16", capabilities=("sm89", "sm120")).export
    assert rtx is not None
    begun, cpu = time.perf_counter(), time.process_time()
    engine = build_engine("gen_layer_00", entry, folder.path / entry.model, rtx, folder.manifest.axes)
    took, cpu = time.perf_counter() - begun, time.process_time() - cpu
    shutil.rmtree(out)
    return {
        "build_s": round(took, 2),
        "build_cpu_s": round(cpu, 2),
        "engine_mb": round(len(engine.data) / 1e6),
        "experts": 2,
    }


# --- measuring --------------------------------------------------------------------------------------------------------


def best_of(mine: Callable[[], object], other: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Shortest seconds of each, taken in turn so that a busy machine slows both; the first round is a warm-up."""
    times: tuple[list[float], list[float]] = ([], [])
    begun = time.perf_counter()
    with torch.no_grad():
        for index in range(1 + rounds):
            if index > 1 and time.perf_counter() - begun > SECONDS:
                break
            for work, kept in zip((mine, other), times, strict=True):
                time.sleep(PAUSE)
                start = time.perf_counter()
                work()
                if index:
                    kept.append(time.perf_counter() - start)
    return min(times[0]), min(times[1])


def cpu_name() -> str:
    """The processor, and what torch and onnxruntime may use of it."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    name = next((x.partition(":")[2].strip() for x in text.splitlines() if x.startswith("model name")), "unknown")
    units = [unit for unit in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile") if unit in text]
    return f"{name} ({', '.join(units)})"


def anonymous_gb() -> float:
    """Anonymous memory of this process now; the highest resident memory where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("RssAnon"))
        return int(line.split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def disk_gb(folder: ExportFolder) -> float:
    return sum(os.path.getsize(folder.path / name) for name in folder.manifest.files) / 1e9


if __name__ == "__main__":
    main()
