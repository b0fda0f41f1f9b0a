"""The verb profile: the time of the parts of a pass, and of its matrix products and attention alone."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from bagel_compress.cli import add_json, add_verb, emit
from bagel_compress.cli.sample import picture_size


def register(verbs: Any) -> None:
    """Adds the parser of profile."""
    parser = add_verb(
        verbs, "profile", "show where the time of a pass goes, and its products and attention alone",
        "bagel-compress profile out/nf4 --size 512x512\n"
        "  bagel-compress profile BAGEL-nano --pass token --dtype fp32 --threads 1",
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder, artifact folder, or a Hub id")
    parser.add_argument("--pass", dest="kind", choices=("step", "prefill", "token"), default="step",
                        help="a denoising pass, reading an edit's turns, or one token (default step)")  # fmt: skip
    parser.add_argument("--size", type=picture_size, metavar="WxH", help="pixels (default: the largest square)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default cpu)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of the CPU (default: torch's)")
    add_json(parser)
    parser.set_defaults(verb=_profile)


def _profile(args: argparse.Namespace) -> int:
    import torch

    from bagel_compress.budgets.device_option import one_device
    from bagel_compress.budgets.latency import device_name
    from bagel_compress.budgets.pass_profile import profile_pass
    from bagel_compress.run.load import open_model

    device = torch.device(one_device(args.device))
    if args.threads:
        torch.set_num_threads(args.threads)
    sampler = open_model(args.model, device, {"bf16": None, "fp32": torch.float32}[args.dtype])
    side = min(1024, sampler.bagel.config.max_latent_size * sampler.bagel.config.image_stride)
    found, name = profile_pass(sampler, args.kind, args.size or (side, side)), device_name(device)
    lines = [
        f"{args.model} on {name}, {args.dtype}: {found.seconds:.4g} s a {args.kind}, {found.ratio:.2f} times its floor"
        f" of {found.floor:.4g} s",
        *([f"{found.reads:.2f} times the {found.reading:.4g} s of reading its weights"] if found.reading else []),
        *(f"{part:<46}{share:>7.1%}" for part, share in found.shares.items()),
    ]
    emit(args, asdict(found) | {"ratio": found.ratio, "device": name}, "\n".join(lines))
    return 0
