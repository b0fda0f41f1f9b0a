"""Makes a calibration set from prompts: job by job, each kept in a part file until the set is complete."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from PIL import Image

from bagel.errors import BagelError
from bagel.inputs import to_rgb
from bagel_compress.calibrate.calibration_set import (
    CalibrationSet,
    Header,
    Inputs,
    codec_fingerprint,
    join,
    save,
)
from bagel_compress.calibrate.record_inputs import record_inputs
from bagel_compress.errors import CalibrationError
from bagel_compress.io.pictures import read_picture

if TYPE_CHECKING:
    from bagel.sampler import Sampler
    from bagel_compress.calibrate.prompts import Job

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
DRAWN = "drawn"  # tensor of a part file: what the job drew, for the jobs that refer to it
Progress = Callable[[str], None]


def make_set(
    sampler: Sampler,
    source: tuple[str, str],
    jobs: Sequence[Job],
    out: str | Path,
    pictures: Sequence[Path] | None = None,
    progress: Progress | None = None,
) -> CalibrationSet:
    """Records all jobs into the file `out` and returns it, opened. Finished jobs of a killed run are kept.

    `source`: public name and digest of the checkpoint that the sampler was loaded from. With `pictures`, files to be
    noised, nothing is sampled and the sampler's model may be without weights. Raises CalibrationError on a picture that
    cannot be read; BagelError on a job that this model cannot run.
    """
    out, progress = Path(out), progress or (lambda message: None)
    header = _header(sampler, source, "sampled" if pictures is None else "pictures")
    given = None if pictures is None else [(path, _file_digest(path)) for path in pictures]
    parts = out.with_name(out.name + ".parts")
    done: dict[str, CalibrationSet] = {}
    for index, job in enumerate(jobs):
        picture = given[index % len(given)] if given else None
        key = _key(header, job, index, next((j for j in jobs if j.name == job.asked.picture), None), picture)
        path = parts / f"{job.name}.safetensors"
        part = _finished(path, header, key)
        if part is None:
            progress(f"{index + 1}/{len(jobs)} {job.name}")
            shown = _opened(picture[0]) if picture else _drawn(done[job.asked.picture]) if job.asked.picture else None
            part = _record(path, sampler, header, job, index, shown, picture is not None, key)
        done[job.name] = part
    readings, tensors = join(done.values())
    save(out, header.model_copy(update={"sequences": readings}), tensors)
    shutil.rmtree(parts, ignore_errors=True)
    return CalibrationSet.open(out)


def pictures_in(folder: str | Path) -> list[Path]:
    """The pictures of a folder, by name. Raises CalibrationError if there are none."""
    folder = Path(folder)
    found = sorted(p for p in folder.glob("*") if p.suffix.lower() in PICTURE_ENDINGS) if folder.is_dir() else []
    if not found:
        raise CalibrationError(
            f"{folder} holds no pictures ({', '.join(PICTURE_ENDINGS)}); give a folder with some, or leave --pictures"
            " away to have the model draw them."
        )
    return found


def _header(sampler: Sampler, source: tuple[str, str], latents: Literal["sampled", "pictures"]) -> Header:
    config = sampler.bagel.config
    sizes = Inputs(
        vocabulary=config.llm.vocab_size,
        hidden=config.llm.hidden_size,
        latent_width=config.latent_width,
        latent_places=config.max_latent_size**2,
        vit_patch=config.vit.patch_size**2 * config.vit.num_channels,
        vit_places=config.vit_max_patches**2,
    )
    versions = {"torch": torch.__version__, "bagel-compress": version("bagel-compress")}
    fingerprint = codec_fingerprint(sampler.text)
    return Header(
        inputs=sizes, tokenizer=fingerprint, source=source[0], source_digest=source[1], latents=latents,
        versions=versions,
    )  # fmt: skip


def _record(
    path: Path,
    sampler: Sampler,
    header: Header,
    job: Job,
    index: int,
    shown: Image.Image | None,
    given: bool,
    key: str,
) -> CalibrationSet:
    """Runs a job and writes its part. `shown`: the drawing that it refers to, or the given picture."""
    takes_picture = bool(job.asked.picture)
    found = record_inputs(sampler, job, index, shown if takes_picture else None, shown if given else None)
    tensors = found.tensors
    if found.drawn is not None:
        tensors[DRAWN] = torch.frombuffer(bytearray(found.drawn.tobytes()), dtype=torch.uint8).reshape(
            found.drawn.height, found.drawn.width, 3
        )
    save(path, header.model_copy(update={"sequences": tuple(found.readings)}), tensors, key)
    return CalibrationSet.open(path)


def _key(header: Header, job: Job, index: int, refers: Job | None, picture: tuple[Path, str] | None) -> str:
    """What a part was made of; a part with another key is made again."""
    facts = [
        header.model_dump(mode="json"),
        json.loads(job.model_dump_json()),
        index,
        None if refers is None else json.loads(refers.model_dump_json()),
        None if picture is None else picture[1],
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _finished(path: Path, header: Header, key: str) -> CalibrationSet | None:
    if not path.exists():
        return None
    part = CalibrationSet.open(path)
    same = part.header.model_copy(update={"sequences": ()}) == header and part.key == key
    return part if same else None


def _drawn(part: CalibrationSet) -> Image.Image:
    return Image.fromarray(part.tensor(DRAWN).numpy())


def _opened(path: Path) -> Image.Image:
    try:
        return to_rgb(read_picture(path))
    except BagelError as error:
        raise CalibrationError(f"{str(error).rstrip('.')}; repair it or take it out.") from None


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
