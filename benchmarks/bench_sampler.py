"""A denoising step, what an edit reads, and a token of text, beside their floor; and beside the official code.

    python benchmarks/bench_sampler.py [--before DIR] [--official DIR] [--work DIR] [--threads 1] [--dtypes fp32]

Models: `synth medium`, and one layer pair of the released shape (`synth 7b-mot --layers 1`), fp32 and bf16, 256 x 256,
on the CPU, in the processor's time. The floor of a pass are its own products and attention alone, in turns with it
(bagel_compress/budgets/pass_profile.py); a token is also compared with the time to read its weights. Goals: a step and
a prefill at 1.15 times the floor, a token at 1.3 times the reading.

--before DIR     measures another checkout of this repository in the same run
--official DIR   draws and edits the medium model with a checkout of github.com/ByteDance-Seed/Bagel as well, with equal
                 weights, noise, points and number of passes, with separate branches and with --merge-branches; its
                 flash-attn replaced by SDPA, its autocast by the CPU's. The official code knows no dtype but bf16; in
                 fp32 the name means float32 to its modules, and autocast is off. It needs the transformers of its
                 requirements (4.49) first on PYTHONPATH.
--dtypes         where the CPU has no arithmetic in bf16, products in it take most of the time and hide the rest
--busy           seconds of a picture of BAGEL-nano alone, and while two other processes keep all cores busy

Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.overrides import TorchFunctionMode

from bagel.config import ResizeRule
from bagel.events import Drawing, Listener, Step
from bagel.inputs import resized, to_tensor
from bagel.one_row import one_row
from bagel.settings import EDIT_FLOW, FlowSettings
from bagel_compress.build.compress import compress
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.io.packaged import resource
from bagel_compress.run.load import open_model
from bagel_compress.source.checkpoint import Checkpoint
from bagel_compress.source.synthetic import synthesise

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"medium": ("medium", None), "pair": ("7b-mot", 1)}  # name -> shape and decoder layers of `synth`
DTYPES = {"fp32": torch.float32, "bf16": None}
KINDS = ("step", "prefill", "token")
AUTOCAST = torch.autocast  # torch's own
SIDE = 256
TASKS = ("t2i", "edit")
PROMPT = "a red cat on a blue chair"
PRODUCTS = (F.linear, one_row, F.conv2d, torch.conv2d, F.scaled_dot_product_attention)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS), help="whose floors are measured")
    parser.add_argument("--side", type=int, default=SIDE, help="of the pictures, pixels")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--before", type=Path, metavar="DIR")
    parser.add_argument("--official", type=Path, metavar="DIR")
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keeps the checkpoints (5 GB)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9, help="turns of which the median is taken")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="beside the official code")
    parser.add_argument("--drawings", type=int, default=3, help="the same, of the pictures beside the official code")
    parser.add_argument(
        "--points", type=int, default=26, help="of the pictures that are drawn beside the official code"
    )
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure:
        print(json.dumps(measured(Path(args.measure[0]), args.measure[1], args.repeats, args.side)))
        return 0
    trees = {"now": ROOT} | ({"before": args.before.resolve()} if args.before else {})
    found: dict[str, Any] = {"benchmark": "bench_sampler", "threads": args.threads, "size": args.side}
    with TemporaryDirectory() if args.work is None else nullcontext(str(args.work)) as work:
        for name in args.models:
            folder = checkpoint(name, Path(work))
            for dtype in args.dtypes:
                found[f"{name} {dtype}"] = {when: in_tree(tree, folder, dtype, args) for when, tree in trees.items()}
                print(name, dtype, json.dumps(found[f"{name} {dtype}"]), file=sys.stderr, flush=True)
        if args.official:
            folder = checkpoint("medium", Path(work))
            found["official"] = {dtype: beside_official(args, folder, Path(work), dtype) for dtype in args.dtypes}
    if args.busy:
        found["busy"] = busy()
    print(json.dumps(found))
    return 0


def checkpoint(name: str, work: Path) -> Path:
    """The folder of a synthetic checkpoint, made where it is missing."""
    shape, layers = MODELS[name]
    folder = work / name
    if not (folder / "ema.safetensors").is_file():
        synthesise(shape, folder, 0, layers)
    return folder


# --- floors -----------------------------------------------------------------------------------------------------------


def in_tree(tree: Path, folder: Path, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """`measured` with the code of a checkout, in a process of its own."""
    command = [sys.executable, __file__, "--measure", str(folder), dtype]
    command += ["--threads", str(args.threads), "--repeats", str(args.repeats), "--side", str(args.side)]
    environment = os.environ | {"PYTHONPATH": f"{tree}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, env=environment, cwd=tree, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def measured(folder: Path, dtype: str, repeats: int, side: int) -> dict[str, Any]:
    """Seconds of each kind of pass, and how many times its floor and its reading they are."""
    profiler = pass_profiler()
    sampler, found = open_model(folder, dtype=DTYPES[dtype]), {}
    for kind in KINDS:
        one = profiler.profile_pass(sampler, kind, (side, side), PROMPT, repeats)
        found[kind] = {"seconds": round(one.seconds, 5), "floor": round(one.floor, 5), "ratio": round(one.ratio, 3)}
        if one.reading:
            found[kind] |= {"reading": round(one.reading, 5), "reads": round(one.reads, 3)}
    return found


def pass_profiler() -> ModuleType:
    """This checkout's profiler, also where the measured code is another checkout's."""
    spec = importlib.util.spec_from_file_location(
        "pass_profiler", ROOT / "bagel_compress" / "budgets" / "pass_profile.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# --- beside the official code -----------------------------------------------------------------------------------------


def beside_official(args: argparse.Namespace, folder: Path, work: Path, dtype: str) -> dict[str, Any]:
    """Seconds of the processor for a drawing and an edit, ours and theirs, in turns; the PSNR of the two pictures.

    "at the floor": how many times as fast as the official code a program would be that took no time but the floor of
    its passes: no reading, no guidance, no VAE. "products": seconds of the products, convolutions and attention of a
    whole run, reading and VAE included; "bound": how many times as fast as the official code they alone would be.
    """
    sampler = open_model(folder, dtype=DTYPES[dtype])
    inferencer = official_inferencer_of(args.official.resolve(), raw_build(folder, work), dtype)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (args.side, args.side, 3), np.uint8))
    t2i = FlowSettings(num_timesteps=args.points)
    edit = replace(EDIT_FLOW, num_timesteps=args.points)
    found, stride = {}, sampler.bagel.config.image_stride
    for name, turns, flow in (("t2i", [PROMPT], t2i), ("edit", [picture, PROMPT], edit)):
        if name not in args.tasks:
            continue
        watch = Watch()

        def ours(
            merged: bool, turns: list[Any] = turns, flow: FlowSettings = flow, watch: Watch = watch
        ) -> Image.Image:
            watch.passes, sampler.merge_branches = 0, merged
            torch.manual_seed(0)
            image = sampler.run(turns, size=(args.side, args.side), flow=flow, noise=torch.randn, listener=watch).image
            assert image is not None
            return image

        def theirs(turns: list[Any] = turns, flow: FlowSettings = flow) -> Image.Image:
            return official_picture(inferencer, turns, flow, args.side)

        programs: dict[str, Callable[[], Image.Image]] = {
            "ours": lambda: ours(False), "merged": lambda: ours(True), "official": theirs,
        }  # fmt: skip
        seconds, images = in_turns(programs, args.drawings)
        products = {}
        for who, draw in programs.items():
            with ProductTimes() as timed:
                draw()
            products[who] = timed.seconds
        sampler.merge_branches = False
        middle = {who: sorted(values)[len(values) // 2] for who, values in seconds.items()}
        size = (watch.grid[0] * stride, watch.grid[1] * stride)
        floor = pass_profiler().profile_pass(sampler, "step", size, PROMPT).floor * watch.passes
        found[name] = {
            **{who: round(value, 3) for who, value in middle.items()},
            "times as fast": {who: round(middle["official"] / middle[who], 3) for who in ("ours", "merged")},
            "at the floor": round(middle["official"] / floor, 3),
            "products": {who: round(value, 3) for who, value in products.items()},
            "bound": {who: round(middle["official"] / products[who], 3) for who in ("ours", "merged")},
            "size": size,
            "passes": watch.passes,
            "psnr": {who: psnr(images[who], images["official"]) for who in ("ours", "merged")},
        }
        print(name, dtype, json.dumps(found[name]), file=sys.stderr, flush=True)
    return found


def in_turns(
    programs: dict[str, Callable[[], Image.Image]], drawings: int
) -> tuple[dict[str, list[float]], dict[str, Image.Image]]:
    """Processor seconds of each drawing by each program, after one that warms up; and the last pictures."""
    seconds: dict[str, list[float]] = {who: [] for who in programs}
    images = {}
    for turn in range(drawings + 1):
        for who, draw in programs.items():
            begun = time.process_time()
            images[who] = draw()
            if turn:
                seconds[who].append(time.process_time() - begun)
    return seconds, images


def raw_build(folder: Path, work: Path) -> Path:
    """The checkpoint with the official names of files and tensors, as the official code loads it."""
    built = work / "medium-raw"
    if not (built / "manifest.json").is_file():
        source = Checkpoint.open(folder)
        recipe = Recipe.parse("name: raw\nrules: [{match: {}, codec: raw}]\n", "bench_sampler")
        compress(make_plan(source, recipe), source, built)
    return built


def official_picture(inferencer: Any, turns: list[Any], flow: FlowSettings, side: int) -> Image.Image:
    torch.manual_seed(0)
    [image] = inferencer.interleave_inference(
        turns, image_shapes=(side, side),
        num_timesteps=flow.num_timesteps, timestep_shift=flow.timestep_shift,
        cfg_text_scale=flow.cfg_text_scale, cfg_img_scale=flow.cfg_img_scale,
        cfg_interval=list(flow.cfg_interval), cfg_renorm_min=flow.cfg_renorm_min,
        cfg_renorm_type=flow.cfg_renorm_type,
    )  # fmt: skip
    return image  # type: ignore[no-any-return]


def psnr(a: Image.Image, b: Image.Image) -> float | None:
    """Decibels; None for equal pictures."""
    error = np.mean(np.subtract(np.asarray(a, np.float64), np.asarray(b, np.float64)) ** 2)
    return round(float(10 * np.log10(255**2 / error)), 1) if error else None


class ProductTimes(TorchFunctionMode):
    """Adds up the processor's time of products, convolutions and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in PRODUCTS:
            return func(*args, **(kwargs or {}))
        begun = time.process_time()
        out = func(*args, **(kwargs or {}))
        self.seconds += time.process_time() - begun
        return out


class Watch(Listener):
    """Counts passes of the network."""

    passes, grid = 0, (0, 0)

    def before_denoise(self, drawing: Drawing) -> None:
        [self.grid] = drawing.grids

    def after_step(self, step: Step) -> Step:
        self.passes += step.passes
        return step


def official_inferencer_of(official: Path, built: Path, dtype: str) -> Any:
    """The official inferencer over the build, with stand-ins for what needs CUDA."""
    sys.path.insert(0, str(official))
    sys.modules["flash_attn"] = stand_in = ModuleType("flash_attn")
    stand_in.__spec__ = importlib.util.spec_from_loader("flash_attn", None)
    stand_in.flash_attn_varlen_func = varlen_by_sdpa  # type: ignore[attr-defined]
    torch.autocast = cpu_autocast(dtype)  # type: ignore[assignment,misc]
    sys.modules["data.transforms"] = transforms = ModuleType("data.transforms")
    transforms.ImageTransform = Resizing  # type: ignore[attr-defined]
    from bagel_compress.interop import official_inferencer

    inferencer = official_inferencer(built, "cpu")
    vae = inferencer.vae_model  # in fp32: CUDA's autocast does not reach the CPU, where the official VAE works
    vae.encode, vae.decode = without_autocast(vae.encode), without_autocast(vae.decode)
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("modeling", "inferencer") and hasattr(module, "torch"):
            module.torch = WideTorch("torch") if dtype == "fp32" else torch  # type: ignore[attr-defined]
    if dtype == "fp32":
        inferencer.model.float()
    return inferencer


class WideTorch(ModuleType):
    """torch for code that names bfloat16 and is to compute in float32."""

    bfloat16 = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def cpu_autocast(dtype: str) -> Callable[..., Any]:
    """torch.autocast, which of CUDA makes the CPU's; off in fp32."""

    def autocast(device_type: str, **settings: Any) -> Any:
        if device_type == "cuda":
            return AUTOCAST("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16")
        return AUTOCAST(device_type, **settings)

    return autocast


class Resizing:
    """The official ImageTransform, whose module needs torchvision and OpenCV."""

    def __init__(self, max_size: int, min_size: int, stride: int) -> None:
        self.stride, self._rule = stride, ResizeRule(max_size=max_size, min_size=min_size, stride=stride)

    def resize_transform(self, image: Image.Image) -> Image.Image:
        return resized(image, self._rule)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return to_tensor(self.resize_transform(image))


def without_autocast(work: Callable[..., Any]) -> Callable[..., Any]:
    def plain(x: torch.Tensor) -> Any:
        with torch.amp.autocast("cpu", enabled=False):
            return work(x.float())

    return plain


def varlen_by_sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int,
    max_seqlen_k: int, causal: bool = False,
) -> torch.Tensor:  # fmt: skip
    """flash-attn's varlen attention for one segment, by torch's SDPA; causal masks are aligned to the bottom right."""
    assert len(cu_seqlens_q) == len(cu_seqlens_k) == 2, "one sample at a time"
    mask = None
    if causal and 1 < max_seqlen_q < max_seqlen_k:
        mask = torch.ones(max_seqlen_q, max_seqlen_k, dtype=torch.bool).tril(max_seqlen_k - max_seqlen_q)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and max_seqlen_q == max_seqlen_k > 1,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out[0].transpose(0, 1)


# --- beside other work ------------------------------------------------------------------------------------------------


def busy() -> dict[str, float]:
    """Seconds of a nano picture on torch's own number of threads, alone and beside one busy process per core."""
    torch.set_num_threads(os.cpu_count() or 1)
    sampler = open_model(resource("BAGEL-nano"))

    def seconds() -> float:
        taken = []
        for _ in range(5):
            begun = time.perf_counter()
            sampler.run(["a red circle"], size=(64, 64))
            taken.append(time.perf_counter() - begun)
        return sorted(taken)[2]

    seconds()
    alone = seconds()
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        beside = seconds()
    finally:
        for other in others:
            other.kill()
            other.wait()
    return {"alone": round(alone, 3), "busy": round(beside, 3), "times": round(beside / alone, 2)}


if __name__ == "__main__":
    sys.exit(main())
