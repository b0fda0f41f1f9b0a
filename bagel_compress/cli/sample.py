"""The verbs generate (text to image), edit (image and text to image) and ask (text, optionally about images).

MODEL is a full-precision checkpoint, an artifact, an ONNX export, or a Hub id of one of them.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bagel_compress.cli import add_json, add_trust, add_verb, emit, say, trusts

if TYPE_CHECKING:
    from bagel.config import BagelConfig
    from bagel.events import Listener
    from bagel.loops import Loops, Result
    from bagel.settings import FlowSettings, TextSettings
    from bagel.static_step import StepRuntime

_MODEL = "checkpoint folder, artifact folder, ONNX export, or a Hub id (user/name)"


def register(verbs: Any) -> None:
    """Adds the parsers of generate, edit and ask."""
    generate = _verb(
        verbs, "generate", "draw a picture from a text",
        'bagel-compress generate out/nf4 "a red cat on a roof" --size 1024x1024 --seed 7 --out cat.png\n'
        '  bagel-compress generate out/nf4 "a poster for a jazz night" --think',
    )  # fmt: skip
    generate.add_argument("prompt", metavar="PROMPT", help="may be empty")
    generate.add_argument(
        "--size",
        type=picture_size,
        metavar="WxH",
        help="pixels, multiples of 16 (default: what the model names, else the largest square)",
    )
    _image_options(generate, {"cfg_img_scale": 1.0, "cfg_interval": (0.4, 1.0), "cfg_renorm_type": "global"})
    generate.set_defaults(verb=_generate)

    edit = _verb(
        verbs, "edit", "change a picture by a text",
        'bagel-compress edit out/nf4 photo.jpg "make it night" --out night.png',
    )  # fmt: skip
    edit.add_argument("image", metavar="IMAGE", type=Path)
    edit.add_argument("prompt", metavar="PROMPT")
    edit.add_argument("--also", metavar="IMAGE", type=Path, action="append", default=[], help="further input pictures")
    _image_options(edit, {"cfg_img_scale": 2.0, "cfg_interval": (0.0, 1.0), "cfg_renorm_type": "text_channel"})
    edit.set_defaults(verb=_edit)

    ask = _verb(
        verbs, "ask", "answer a question, about a picture if there is one",
        'bagel-compress ask out/nf4 photo.jpg "what is in the picture?"\n'
        '  bagel-compress ask out/nf4 "why is the sky blue?" --think',
    )  # fmt: skip
    ask.add_argument("inputs", metavar="[IMAGE ...] QUESTION", nargs="+")
    _text_options(ask, 512)
    ask.set_defaults(verb=_ask)


def _verb(verbs: Any, name: str, text: str, examples: str) -> argparse.ArgumentParser:
    parser = add_verb(verbs, name, text, examples)
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    parser.add_argument(
        "--device", default="auto",
        help="cpu, cuda, cuda:1, or several: cuda:0,cuda:1 (auto: as many CUDA devices as needed, else the CPU)",
    )  # fmt: skip
    parser.add_argument(
        "--target", metavar="T", help="keep parts of the model in host memory in the phases that this target defines"
    )
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument(
        "--adapter", metavar="DIR", help="compute a LoRA beside the model's linears: a folder that `finetune` wrote"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise; the same seed gives the same picture")
    parser.add_argument("--think", action="store_true", help="let the model plan in words first")
    add_trust(parser)
    add_json(parser)
    return parser


def _image_options(parser: argparse.ArgumentParser, defaults: dict[str, Any]) -> None:
    flow = parser.add_argument_group("sampler")
    flow.add_argument("--steps", type=int, default=50, dest="num_timesteps", help="points of the schedule (50)")
    flow.add_argument("--shift", type=float, default=3.0, dest="timestep_shift", help="timestep shift (3.0)")
    flow.add_argument(
        "--cfg-text", type=float, default=4.0, dest="cfg_text_scale", help="text guidance; 1 is off (4.0)"
    )
    flow.add_argument("--cfg-image", type=float, default=defaults["cfg_img_scale"], dest="cfg_img_scale",
                      help="image guidance; 1 is off (%(default)s)")  # fmt: skip
    flow.add_argument("--cfg-interval", type=float, nargs=2, default=defaults["cfg_interval"], metavar=("LOW", "HIGH"),
                      help="guidance acts where LOW < t <= HIGH (%(default)s)")  # fmt: skip
    flow.add_argument("--renorm", default=defaults["cfg_renorm_type"], dest="cfg_renorm_type",
                      help="global, channel or text_channel (%(default)s)")  # fmt: skip
    flow.add_argument(
        "--renorm-min", type=float, default=0.0, dest="cfg_renorm_min", help="1 turns renormalisation off"
    )
    speed = parser.add_argument_group("speed (docs/speed.md; the defaults are the official sampler)")
    speed.add_argument("--solver", default="euler", help="euler, ab2, dpm2 or heun (%(default)s)")
    speed.add_argument("--cache-every", type=int, default=1, metavar="K",
                       help="evaluate the network at every K-th step, forecast the others (%(default)s)")  # fmt: skip
    speed.add_argument("--cache-threshold", type=float, default=0.0, metavar="R",
                       help="evaluate the network when the picture has changed by this share; 0 is off (%(default)s)",
                       )  # fmt: skip
    speed.add_argument("--cache-order", type=int, default=1, metavar="N",
                       help="order of the forecast, 0 to 2 (%(default)s)")  # fmt: skip
    speed.add_argument("--preset", metavar="NAME", help="use the settings of this preset of the build's recipe")
    speed.add_argument("--guidance-every", type=int, default=1, metavar="K",
                       help="evaluate the guidance branches at every K-th evaluation (%(default)s)")  # fmt: skip
    speed.add_argument("--step-runtime", choices=("eager", "static", "compiled", "cuda-graph"), default="eager",
                       help="how a denoising step runs: compiled by torch.compile, or replayed as a CUDA graph"
                       " (%(default)s)")  # fmt: skip
    speed.add_argument(
        "--merge-branches",
        action="store_true",
        help="evaluate the branches of guidance in one pass: faster for small pictures, more memory",
    )
    parser.add_argument(
        "--out", type=Path, metavar="PNG", help="file to write (default: out.png, or the next free out-N.png)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite an existing file")
    _text_options(parser, 1000)


def _text_options(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    text = parser.add_argument_group("text")
    text.add_argument("--max-tokens", type=int, default=max_tokens, help="at most this many (%(default)s)")
    text.add_argument("--sample", action="store_true", help="sample instead of taking the likeliest token")
    text.add_argument("--temperature", type=float, default=0.3, help="of sampling (%(default)s)")


def picture_size(value: str) -> tuple[int, int]:
    """WxH -> (height, width)."""
    width, cross, height = value.lower().partition("x")
    if not (cross and all(side.isascii() and side.isdecimal() and len(side) < 7 for side in (width, height))):
        raise argparse.ArgumentTypeError(f"{value!r} is not a size; expected WIDTHxHEIGHT, as in 1024x576")
    return int(height), int(width)


def _generate(args: argparse.Namespace) -> int:
    flow, text = _flow(args), _text(args)
    out = _out(args)
    sampler = _opened(args, None if args.size is None else lambda config: config.check_size(args.size))
    size = sampler.bagel.config.usual_size if args.size is None else args.size
    return _picture(args, out, sampler, [args.prompt], flow, text, size)


def _edit(args: argparse.Namespace) -> int:
    from bagel_compress.io.pictures import read_picture

    flow, text = _flow(args), _text(args)
    turns = [*(read_picture(path) for path in [args.image, *args.also]), args.prompt]
    out = _out(args)
    return _picture(args, out, _opened(args), turns, flow, text, None)


def _out(args: argparse.Namespace) -> Path:
    """The PNG file to write: a new one, or with --force an existing one. Raises InputError if it cannot be written."""
    from bagel_compress.errors import InputError

    out: Path = args.out or Path("out.png")
    if out.is_dir():
        raise InputError(f"{out} is a folder; name a PNG file in it with --out.")
    if out.exists() and not out.is_file():
        return out  # /dev/null, a pipe
    if out.suffix.lower() != ".png":
        raise InputError(f"{out} does not end in .png, and pictures are written as PNG; name it {out.stem}.png.")
    if not args.force and args.out is None:
        numbered = (out.with_name(f"{out.stem}-{number}.png") for number in count(2))
        return next(path for path in chain([out], numbered) if not path.exists())
    if out.exists() and not args.force:
        raise InputError(f"{out} exists; give another name with --out, or --force to overwrite it.")
    parent = next(parent for parent in out.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{out} cannot be written: {parent} is no folder that you may write to.")
    return out


def _picture(
    args: argparse.Namespace,
    out: Path,
    sampler: Loops,
    turns: Sequence[Any],
    flow: FlowSettings,
    text: TextSettings,
    size: tuple[int, int] | None,
) -> int:
    from bagel_compress.io.atomic import atomic_path
    from bagel_compress.run.picture_settings import picture_settings, png_info

    begun = time.perf_counter()
    with _progress(flow.num_timesteps - 1) as bar:
        result = sampler.run(turns, think=args.think, size=size, flow=flow, text=text, seed=args.seed, listener=bar)
    assert result.image is not None
    prompt = next(turn for turn in turns if isinstance(turn, str))
    settings = picture_settings(args.model, prompt, args.seed, result.image.size, flow, text if args.think else None)
    with atomic_path(out) as partial:
        result.image.save(partial, "PNG", pnginfo=png_info(settings))
    data = {
        "image": str(out), "width": result.image.width, "height": result.image.height, "seed": args.seed,
        "thoughts": result.text, "seconds": round(time.perf_counter() - begun, 3),
    }  # fmt: skip
    thoughts = f"{result.text}\n" if result.text else ""
    emit(args, data, f"{thoughts}{out} ({result.image.width}x{result.image.height}, seed {args.seed})")
    return 0


def _ask(args: argparse.Namespace) -> int:
    from bagel_compress.errors import InputError
    from bagel_compress.io.pictures import read_picture

    text = _text(args)
    *paths, question = args.inputs
    if Path(question).is_file():
        raise InputError(f'a question is missing after {question}; as in: ask MODEL {question} "what is this?"')
    turns = [*(read_picture(Path(p)) for p in paths), question]
    result: Result = _opened(args).run(turns, output="text", think=args.think, text=text, seed=args.seed)
    emit(args, {"answer": result.text, "tokens": len(result.ids)}, result.text or "")
    return 0


def _flow(args: argparse.Namespace) -> FlowSettings:
    from bagel.settings import FlowSettings, check_seed
    from bagel_compress.run.presets import with_preset

    check_seed(args.seed)
    names = FlowSettings.__dataclass_fields__
    flow = FlowSettings(**{**{n: getattr(args, n) for n in names}, "cfg_interval": tuple(args.cfg_interval)})
    return flow if args.preset is None else with_preset(flow, args.preset, _folder(args))


def _folder(args: argparse.Namespace) -> Path:
    from bagel_compress.run.load import downloaded

    return Path(args.model) if Path(args.model).exists() else downloaded(args.model)


def _text(args: argparse.Namespace) -> TextSettings:
    from bagel.settings import TextSettings, check_seed

    check_seed(args.seed)
    return TextSettings(args.max_tokens, args.sample, args.temperature)


def _opened(args: argparse.Namespace, check: Callable[[BagelConfig], object] | None = None) -> Loops:
    """The model of `_adapted`, whose denoising steps run as --step-runtime and --merge-branches say."""
    sampler = _adapted(args, check)
    runtime: StepRuntime = getattr(args, "step_runtime", "eager")
    merged: bool = getattr(args, "merge_branches", False)
    if runtime == "eager" and not merged:
        return sampler
    from bagel.sampler import Sampler
    from bagel_compress.errors import InputError

    if not isinstance(sampler, Sampler):
        raise InputError(
            f"{args.model} is an export with a runtime of its own; leave --step-runtime and --merge-branches away."
        )
    sampler.step_runtime, sampler.merge_branches = runtime, merged
    return sampler


def _adapted(args: argparse.Namespace, check: Callable[[BagelConfig], object] | None) -> Loops:
    """The model of `_placed`, with the adapter that --adapter names beside its linears."""
    if args.adapter is None:
        return _placed(args, check)
    from bagel.sampler import Sampler
    from bagel_compress.errors import FinetuneError
    from bagel_compress.finetune.lora import attach

    if args.target is not None or "," in args.device:
        raise FinetuneError("--adapter runs on one device without a residency plan; leave --target and lists away.")
    sampler = _placed(args, check)
    if not isinstance(sampler, Sampler):
        raise FinetuneError(f"{args.model} is an export, which takes no adapter; merge it with `compress --lora`.")
    attach(sampler.bagel, args.adapter)
    return sampler


def _placed(args: argparse.Namespace, check: Callable[[BagelConfig], object] | None) -> Loops:
    """The opened model on the device of --device, offloaded as --target defines; an export in its own runtime.

    `check` is called with the model's configuration before weights are read.
    """
    from bagel_compress.build.manifest import EXPORT_MANIFEST

    folder, trust = _folder(args), trusts(args, args.model)
    if (folder / EXPORT_MANIFEST).is_file():
        from bagel_compress.exporting.ort_sampler import open_onnx

        export = open_onnx(folder, None if args.device == "auto" else args.device.partition(":")[0], trust=trust)
        if check is not None:
            check(export.bagel.config)
        return export

    import torch

    from bagel_compress.budgets.device_option import choose_device, one_device
    from bagel_compress.run.load import open_model
    from bagel_compress.run.offload import place
    from bagel_compress.run.target import Target

    dtype = {"bf16": None, "fp32": torch.float32}[args.dtype]
    if args.target is None and dtype is None:
        return open_model(folder, choose_device(args.device, folder, say), check=check, trust=trust)
    device = one_device(args.device)
    if args.target is None:
        return open_model(folder, device, dtype, check, trust)
    target = Target.load(args.target)
    sampler = open_model(folder, "cpu", dtype, check, trust)
    place(sampler, target, device)
    return sampler


@contextmanager
def _progress(total: int) -> Iterator[Listener]:
    """A progress bar on stderr over the denoising steps. Yields the listener that moves it."""
    from tqdm import tqdm

    from bagel.events import Listener, Step

    with tqdm(total=total, unit="step", desc="denoise", leave=False) as bar:

        class Bar(Listener):
            def after_step(self, step: Step) -> Step:
                bar.update()
                return step

        yield Bar()
