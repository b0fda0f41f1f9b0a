"""Compares a replay with its recording, tensor by tensor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from bagel.conformance import parts, replay
from bagel.conformance.golden import Golden, Tensors, levels
from bagel.errors import BagelError

LIMITS = {"fp32": 1e-4, "bf16": 5e-2}  # relative L2; the bf16 recording itself moves 2 to 5 % with the summation order
MARGIN = {"fp32": 1e-3, "bf16": 5e-1}  # logits closer than this may swap places (fp32: the manifest's own rule)
IDS = ("gentext0.argmax_ids", "gentext0.output_ids", "saved.output_ids")


@dataclass(frozen=True, slots=True)
class ScenarioResult:
    """The outcome of one scenario."""

    scenario: str
    tensors: int  # how many were compared
    error: float  # worst relative L2 error; inf where something must be equal and is not
    tensor: str  # the worst one
    limit: float
    ok: bool
    note: str = ""


def check(folder: Path, mode: str) -> list[ScenarioResult]:
    """Replays every scenario of `folder/manifest.json` that was recorded in `mode`."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BagelError(f"{folder} has no manifest.json; expected a golden folder.") from None
    golden = Golden.open(folder, manifest, mode)
    names = [n for n, s in manifest["scenarios"].items() if mode in s["runs"]]
    if not names:
        raise BagelError(f"{folder}: no scenario was recorded in {mode}.")
    return [_row(golden, name) for name in names]


def replayed(golden: Golden, name: str) -> Tensors:
    """All tensors of a scenario, computed here. Inputs (noise, raw draws) are taken from the recording."""
    scenario = golden.manifest["scenarios"][name]
    kinds = {
        "infer": replay.infer, "interleave": replay.infer, "chat": replay.chat, "batch_t2i": replay.batch_t2i,
        "vae": parts.vae, "resize": parts.resize, "pieces": parts.pieces, "train": parts.train,
    }  # fmt: skip
    return kinds[scenario["kind"]](golden, scenario, golden.recorded(name))


def _row(golden: Golden, name: str) -> ScenarioResult:
    limit = LIMITS[golden.mode]
    run = golden.manifest["scenarios"][name]["runs"][golden.mode]
    missing = [f for f in (run["file"], run.get("out_image")) if f and not (golden.folder / f).exists()]
    if missing:
        return ScenarioResult(name, 0, float("inf"), "", limit, False, f"{missing[0]} is missing")
    given, found = golden.recorded(name), replayed(golden, name)
    errors = _errors(golden, given, found)
    if run.get("out_image"):
        with Image.open(golden.folder / run["out_image"]) as picture:
            errors["out_image"] = _picture_error(found["out_image"], levels(picture), golden.mode)
    promised = run.get("tensors", {})
    unseen = [t for t in promised if t not in errors and t not in run["info"].get("empty", [])]
    if unseen:
        return ScenarioResult(
            name, len(errors), float("inf"), unseen[0], limit, False, f"{len(unseen)} tensors not compared"
        )
    worst = max(errors, key=lambda n: errors[n])
    return ScenarioResult(name, len(errors), errors[worst], worst, limit, errors[worst] <= limit)


def _errors(golden: Golden, given: Tensors, found: Tensors) -> dict[str, float]:
    """Relative L2 error per recorded tensor that was computed (0 or inf for those that must be equal)."""
    errors: dict[str, float] = {}
    margins = given.get("gentext0.top2_margin")
    for name, wanted in given.items():
        if name in found:
            if name in IDS:
                errors[name] = _id_error(found[name], wanted, margins, golden.mode)
            elif name == "gentext0.top2_margin":
                errors[name] = _margin_error(found[name], wanted, given)
            else:
                errors[name] = error(found[name], wanted)
    for name, value in found.items():
        if name == "saved.output_ids":
            errors[name] = _id_error(value, given["gentext0.output_ids"], margins, golden.mode)
        elif name.startswith("saved."):
            errors[name] = error(value, given[f"gen.{name.removeprefix('saved.')}"])
        elif name.endswith(".expected"):
            errors[name.removesuffix(".expected")] = error(found[name.removesuffix(".expected")], value)
    return errors


def error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|; integers, booleans and shapes must be equal (0 or inf)."""
    if found.numel() != wanted.numel():
        return float("inf")
    found = found.reshape(wanted.shape)
    if torch.equal(found, wanted):
        return 0.0
    if not wanted.is_floating_point():
        return float("inf")
    difference = (found.double() - wanted.double()).norm().item()
    scale = wanted.double().norm().item()
    value = difference / scale if scale else difference
    return value if value == value else float("inf")


def _id_error(found: Tensor, wanted: Tensor, margins: Tensor | None, mode: str) -> float:
    """0 where ids agree up to the first position whose two best logits are too close to call, else inf.

    `wanted` begins with the start token; as many `margins`, of the logits at each id, which choose the one after it.
    """
    close = [] if margins is None else (margins.flatten() <= MARGIN[mode]).nonzero().flatten().tolist()
    sure = close[0] + 1 if close else len(wanted.flatten())
    same_length = bool(close) or found.numel() == wanted.numel()
    return 0.0 if same_length and torch.equal(found[:sure], wanted.flatten()[:sure]) else float("inf")


def _margin_error(found: Tensor, wanted: Tensor, given: Tensors) -> float:
    """Margins are small differences of large logits: their error is measured against the logits' scale."""
    scale = given["gentext0.logits_first8"].double().abs().amax() if "gentext0.logits_first8" in given else None
    difference = (found.double() - wanted.double()).abs().amax()
    return float(difference / (scale if scale is not None else wanted.double().abs().amax()))


def _picture_error(found: Tensor, wanted: Tensor, mode: str) -> float:
    """fp32: pictures may differ by one level of 255 where truncation flips. bf16: mean difference against 255."""
    if found.shape != wanted.shape:
        return float("inf")
    difference = (found.int() - wanted.int()).abs()
    if mode == "bf16":
        return float(difference.double().mean() / 255)
    return 0.0 if int(difference.amax()) <= 1 else float("inf")
