"""The verb calibrate: records the model inputs that calibrated rounding is based on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bagel_compress.cli import add_json, add_verb, emit, say

if TYPE_CHECKING:
    from bagel.sampler import Sampler
    from bagel_compress.calibrate.calibration_set import CalibrationSet
    from bagel_compress.run.device_map import DeviceChoice
    from bagel_compress.source.checkpoint import Checkpoint

# Largest picture side of a set of packaged prompts in pixels, and the folder of the set.
PROMPTS_BY_SIDE = ((1024, "."), (128, "tiny"), (0, "nano"))


def register(verbs: Any) -> None:
    """Adds the parser of calibrate."""
    calibrate = add_verb(
        verbs, "calibrate", "record the calibration set of calibrated rounding; run it again to continue",
        "bagel-compress calibrate --source BAGEL-7B-MoT --out bagel.calibration.safetensors --device cuda\n"
        "  bagel-compress calibrate --source BAGEL-7B-MoT --out small.calibration.safetensors --pictures photos"
        " --rows 16384\n"
        "  bagel-compress compress nf4 --source my-finetune --calibration bagel.calibration.safetensors --out out/nf4",
    )  # fmt: skip
    calibrate.add_argument(
        "--source", required=True, metavar="SRC", help="the base model, or a fine-tune: folder or Hub id"
    )
    calibrate.add_argument(
        "--base", metavar="SRC", help="checkpoint that supplies configs, tokenizer and VAE if SRC lacks them"
    )
    calibrate.add_argument("--lora", metavar="DIR", help="peft adapter folder to merge while reading")
    calibrate.add_argument(
        "--out", required=True, metavar="FILE", help="file to write; parts lie beside it until it is done"
    )
    calibrate.add_argument(
        "--cases", metavar="PROMPTS", nargs="+", help="files or folders of calibration prompts (default: packaged ones)"
    )
    calibrate.add_argument(
        "--pictures", metavar="DIR",
        help="use these pictures instead of drawing them with the model; only the VAE is then run",
    )  # fmt: skip
    calibrate.add_argument("--rows", type=int, metavar="N", help="use only as many prompts as give about N latent rows")
    calibrate.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, or several: cuda:0,cuda:1 (default cpu)")
    add_json(calibrate)
    calibrate.set_defaults(verb=_calibrate)


def _calibrate(args: argparse.Namespace) -> int:
    from bagel_compress.budgets.device_option import choose_device
    from bagel_compress.cli.build import open_checkpoint

    checkpoint = open_checkpoint(args)
    device = choose_device(args.device, args.source, say)
    found = record_set(checkpoint, Path(args.out), args.cases, args.pictures, args.rows, device)
    rows, header = found.rows, found.header
    data = {
        "path": str(found.path),
        "digest": found.digest,
        "bytes": found.path.stat().st_size,
        "sequences": len(header.sequences),
        "latents": header.latents,
        "rows": {"und": rows.und, "gen": rows.gen, "read_und": rows.read_und, "read_gen": rows.read_gen},
    }
    text = (
        f"{found.path}: {data['bytes']:,} bytes, {len(header.sequences)} sequences; {rows.und:,} rows for the"
        f" understanding and {rows.gen:,} for the generation expert; calibration set {found.digest[:12]}"
    )
    emit(args, data, text)
    return 0


def record_set(
    checkpoint: Checkpoint,
    out: Path,
    prompts: list[str] | None = None,
    pictures: str | None = None,
    rows: int | None = None,
    device: DeviceChoice = "cpu",
) -> CalibrationSet:
    """Records a calibration set of a checkpoint into `out`, with messages on stderr.

    `prompts` are files or folders of prompts (default: packaged ones for the model's picture size), `pictures` is a
    folder of pictures to use instead of drawing them, `rows` limits the latent rows by leaving prompts out.
    """
    from bagel_compress.calibrate.make_set import make_set, pictures_in
    from bagel_compress.calibrate.prompts import latent_rows, load_jobs, thinned
    from bagel_compress.io.packaged import resource

    given = None if pictures is None else pictures_in(pictures)
    sampler = _sampler(checkpoint, device, drawing=given is None)
    stride = sampler.bagel.config.image_stride
    largest = sampler.bagel.config.max_latent_size * stride
    packaged = next(folder for side, folder in PROMPTS_BY_SIDE if largest >= side)
    jobs = load_jobs(prompts or [resource("exports") / "calibration" / packaged])
    if rows is not None:
        jobs = thinned(jobs, rows / latent_rows(jobs, stride))
    return make_set(sampler, (checkpoint.name, checkpoint.digest), jobs, out, given, say)


def _sampler(checkpoint: Checkpoint, device: DeviceChoice, drawing: bool) -> Sampler:
    """The sampler of the checkpoint; if it need not draw, only the VAE has weights."""
    from bagel_compress.run.load import load_checkpoint

    if drawing:
        return load_checkpoint(checkpoint, device)
    import torch

    from bagel.loading import load_vae, unfilled
    from bagel.model import Bagel
    from bagel.sampler import Sampler
    from bagel_compress.build.calibrated import model_config

    config, text = model_config(checkpoint)
    with unfilled():
        empty = Bagel(config)
    vae = load_vae(checkpoint.files["ae.safetensors"].parent, torch.device("cpu"), checkpoint.files["ae.safetensors"])
    return Sampler(empty, vae, text)
