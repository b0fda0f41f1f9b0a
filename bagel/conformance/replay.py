"""Replays the sampling scenarios of a golden folder and gives every tensor under its recorded name.

The replay is plain: nothing is skipped and nothing is shared, so that each intermediate exists. A second run, with all
savings on, is given as `saved.*` and must agree with the same recording.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from bagel.branches import Noise
from bagel.conformance.golden import Golden, Tensors, levels
from bagel.conformance.packing import block_rows, constant_positions, lengths, merged_slots, running_positions
from bagel.context import Context
from bagel.events import Drawing, Listener, Prefill, Step, StepInput
from bagel.flow import FlowSettings
from bagel.inputs import grid_ids, resized, to_rgb, to_tensor
from bagel.loops import DEFAULT_SIZE, Request
from bagel.sampler import TextSettings, Turn

# Arguments that a recording does not repeat because they are the official defaults (sampler method; text decoding).
SAMPLER_DEFAULTS: dict[str, Any] = {
    "num_timesteps": 24, "timestep_shift": 1.0, "cfg_text_scale": 1.0, "cfg_img_scale": 1.0,
    "cfg_interval": (0.0, 1.0), "cfg_renorm_min": 0.0, "cfg_renorm_type": "global",
}  # fmt: skip
MAX_THINK_TOKENS = 1000


class _ContextRecorder(Listener):
    """Stores every event under the recorded names, and feeds what the recording had: noise, ids, velocities in bf16.

    Ids are always the recorded ones, since an early flip would make all later logits incomparable.
    """

    def __init__(self, golden: Golden, given: Tensors) -> None:
        self.golden, self.out = golden, Tensors()
        self.sampler = copy.copy(golden.sampler)
        self.sampler.share_branches = False
        self._given, self._model = given, golden.sampler.bagel
        self._event, self._prefix = 0, ""
        self._moments: list[Tensor] = []
        self._logits: list[Tensor] = []
        self._taps: Tensors = {}

    # --- contexts -----------------------------------------------------------------------------------------------------

    def before_encode(self, images: Sequence[Image.Image]) -> None:
        rule = self._model.config.vae_rule
        pixels = [to_tensor(resized(image, rule))[None] for image in images]
        self._moments = [torch.cat(self.sampler.vae.moments(p), dim=1) for p in pixels]

    def before_prefill(self, work: Prefill) -> Prefill:
        kind = {"text": "text", "latent": "vae", "vit": "vit"}[work.kind]
        self._prefix = prefix = f"ctx{self._event}_{kind}"
        self._event += 1
        if work.kind == "text":
            self._text_turn(work)
        elif work.kind == "vit":
            patch = self._model.config.vit.patch_size
            lens = [i.shape[1] * i.shape[2] // patch**2 for i in work.content]
            self._block(work.contexts, lens, "packed_vit_token_indexes")
            self.out[f"{prefix}.vit_token_seqlens"] = torch.tensor(lens)
        else:
            patch = self._model.config.latent_patch_size
            lens = [latent.shape[1] * latent.shape[2] // patch**2 for latent in work.content]
            self._block(work.contexts, lens, "packed_vae_token_indexes")
            self.out |= {
                f"{prefix}.vae_moments": torch.cat(self._moments),
                f"{prefix}.packed_timesteps": torch.zeros(1),
                f"{prefix}.vae_noise": self._given[f"{prefix}.vae_noise"].float(),
            }
        return replace(work, tap=lambda name, tensor: self.out.__setitem__(f"{prefix}.{name}", tensor))

    def after_prefill(self, work: Prefill) -> None:
        self.out[f"{self._prefix}.out_kv_lens"] = lengths(work.contexts)
        self.out[f"{self._prefix}.out_ropes"] = torch.tensor([c.rope for c in work.contexts])

    def _text_turn(self, work: Prefill) -> None:
        prefix, lens = self._prefix, [len(turn) for turn in work.content]
        query, cached = merged_slots(work.contexts, lens)
        self.out |= {
            f"{prefix}.text_token_lens": torch.tensor(lens),
            f"{prefix}.packed_text_ids": torch.tensor([i for turn in work.content for i in turn]),
            f"{prefix}.packed_text_position_ids": running_positions(work.contexts, lens),
            f"{prefix}.packed_text_indexes": query,
            f"{prefix}.packed_key_value_indexes": cached,
            f"{prefix}.key_values_lens": lengths(work.contexts),
        }

    def _block(self, contexts: Sequence[Context], lens: list[int], rows_name: str) -> None:
        prefix, full = self._prefix, [n + 2 for n in lens]
        slots, cached = merged_slots(contexts, full)
        wrappers, rows = block_rows(lens)
        self.out |= {
            f"{prefix}.packed_text_ids": torch.tensor(list(self.sampler.wrap) * len(lens)),
            f"{prefix}.packed_text_indexes": wrappers,
            f"{prefix}.{rows_name}": rows,
            f"{prefix}.packed_position_ids": constant_positions(contexts, full),
            f"{prefix}.packed_seqlens": torch.tensor(full),
            f"{prefix}.packed_indexes": slots,
            f"{prefix}.packed_key_value_indexes": cached,
            f"{prefix}.key_values_lens": lengths(contexts),
        }

    # --- text ---------------------------------------------------------------------------------------------------------

    def before_decode(self, contexts: Sequence[Context]) -> None:
        _kv(self.out, "gentext0.kv_prefill", contexts)
        self.out |= {
            "gentext0.start_position_ids": torch.tensor([c.rope for c in contexts]),
            "gentext0.start_tokens": torch.tensor([self.sampler.text.bos] * len(contexts)),
        }

    def logits(self, samples: Sequence[int], logits: Tensor) -> list[int]:
        self._logits.append(logits)
        recorded = self._given["gentext0.output_ids"].flatten().tolist()
        if len(self._logits) < len(recorded):
            return [recorded[len(self._logits)]]
        rows = torch.cat(self._logits)
        top2 = rows.float().topk(2, dim=-1).values
        self.out |= {
            "gentext0.logits_first8": rows[:8],
            "gentext0.top2_margin": top2[:, 0] - top2[:, 1],
            "gentext0.argmax_ids": rows.argmax(-1),
        }
        return [self.sampler.text.eos]

    # --- pictures -----------------------------------------------------------------------------------------------------

    def before_denoise(self, drawing: Drawing) -> None:
        self._drawing, config = drawing, self._model.config
        lens = [rows * columns for rows, columns in drawing.grids]
        full = [n + 2 for n in lens]
        wrappers, rows = block_rows(lens)
        ids = [grid_ids(r, c, config.max_latent_size, config.interpolate_pos) for r, c in drawing.grids]
        self.out |= {
            "gen.packed_init_noises": self._given["gen.packed_init_noises"],
            "gen.packed_text_indexes": wrappers,
            "gen.packed_vae_token_indexes": rows,
            "gen.packed_vae_position_ids": torch.cat(ids),
            "gen.packed_seqlens": torch.tensor(full),
            "gen.packed_text_ids": torch.tensor(list(self.sampler.wrap) * len(lens)),
            "gen.timesteps_full": drawing.times,
        }
        branches = drawing.branches
        for kv_name, prefix, contexts, name in (
            ("kv_cond", "gen.", branches.cond, "packed_indexes"),
            ("kv_cfg_text", "gen.cfg_text_", branches.text_dropped, "packed_query_indexes"),
            ("kv_cfg_img", "gen.cfg_img_", branches.image_dropped, "packed_query_indexes"),
        ):
            _kv(self.out, kv_name, contexts)
            slots, cached = merged_slots(contexts, full)
            self.out |= {
                f"{prefix}packed_position_ids": constant_positions(contexts, full),
                f"{prefix}key_values_lens": lengths(contexts),
                f"{prefix}{name}": slots,
                f"{prefix}packed_key_value_indexes": cached,
            }

    def before_step(self, work: StepInput) -> StepInput:
        return replace(work, tap=self._taps.__setitem__) if work.index == 0 else work

    def after_step(self, step: Step) -> Step:
        at = f"step{step.index}"
        self.out |= {f"{at}.x_t": step.x, f"{at}.t": step.t, f"{at}.v_cond": step.v_cond, f"{at}.v": step.v}
        for name, value in (("v_cfg_text", step.v_text), ("v_cfg_img", step.v_image)):
            if value is not None:
                self.out[f"{at}.{name}"] = value
        if self.golden.mode == "fp32" or f"{at}.v" not in self._given:
            return step
        # bf16 roundings that flip would grow from step to step: go on from the recorded velocity there.
        dt = step.t - self._drawing.times[step.index + 1]
        return replace(step, x_next=self.sampler.euler(step.x, self._given[f"{at}.v"], dt))

    def before_picture(self, latents: Sequence[Tensor]) -> Sequence[Tensor]:
        named = self._taps.items()
        self.out |= {f"step0.{n}" if n == "time_embed" else f"step0.cond.{n}": value for n, value in named}
        self.out |= {f"gen.out_latent{i}": latent for i, latent in enumerate(latents)}
        z = self._model.unpack_latent(latents[0], *self._drawing.grids[0])[None]
        self.out |= {"vae_dec.z": z, "vae_dec.image": self.sampler.vae.decode(z)}
        return latents


@torch.no_grad()
def infer(golden: Golden, scenario: dict[str, Any], given: Tensors) -> Tensors:
    """A request of the official inferencer: turns to a text or a picture."""
    kwargs, turns = scenario["kwargs"], _turns(golden, scenario)
    settings: dict[str, Any] = {
        "output": "text" if kwargs.get("understanding_output") else "image",
        "think": bool(kwargs.get("think")),
        "size": tuple(kwargs.get("image_shapes", DEFAULT_SIZE)),
        "text": TextSettings(max_tokens=kwargs.get("max_think_token_n", MAX_THINK_TOKENS)),
    }
    if settings["output"] == "image":
        settings["flow"] = _flow(golden, scenario)
    recorder = _ContextRecorder(golden, given)
    with golden.as_recorded():
        recorder.sampler.run(turns, **settings, noise=_replayed_noise(given), listener=recorder)
    out = recorder.out
    pictures = [turn for turn in turns if not isinstance(turn, str)]
    if pictures:
        out["image_after_vae_resize"] = levels(resized(to_rgb(pictures[-1]), golden.sampler.bagel.config.vae_rule))
    saved = golden.sampler.run(turns, **settings, noise=_replayed_noise(given))
    if saved.ids:
        out |= _ids(golden, given, saved.ids)
    if saved.image is not None and saved.latent is not None:
        out |= {"saved.out_latent0": saved.latent, "out_image": levels(saved.image)}
    return out


def _turns(golden: Golden, scenario: dict[str, Any]) -> list[Turn]:
    if scenario["kind"] == "interleave":
        return [golden.image(i[4:]) if i.startswith("img:") else i for i in scenario["inputs"]]
    image = [] if scenario.get("image") is None else [golden.image(scenario["image"])]
    return [*image, *([] if scenario.get("text") is None else [scenario["text"]])]


def _replayed_noise(given: Tensors, *sizes: int) -> Noise:
    """The recorded draws, in order: one per input picture, then the initial x (of each sample, of so many rows)."""
    names = sorted((n for n in given if n.endswith("_vae.vae_noise")), key=lambda n: int(n[3 : n.index("_")]))
    draws = [given[name].float() for name in names]
    if "gen.packed_init_noises" in given:
        initial = given["gen.packed_init_noises"]
        draws += initial.split(list(sizes)) if sizes else [initial]
    waiting = iter(draws)

    def noise(shape: tuple[int, ...]) -> Tensor:
        value = next(waiting)
        assert tuple(value.shape) == shape, f"the recording drew {tuple(value.shape)}, the sampler asked for {shape}"
        return value

    return noise


def _flow(golden: Golden, scenario: dict[str, Any]) -> FlowSettings:
    resolved = scenario["runs"][golden.mode]["info"].get("generate_image", {})
    values = {**SAMPLER_DEFAULTS, **scenario["kwargs"], **resolved}
    values = {k: v for k, v in values.items() if k in SAMPLER_DEFAULTS}
    return FlowSettings(**{**values, "cfg_interval": tuple(values["cfg_interval"])})


def _ids(golden: Golden, given: Tensors, saved: list[int]) -> Tensors:
    """The ids of the free run; in fp32 they are those that the recording decoded as well."""
    free = torch.tensor(saved)
    return {
        "gentext0.output_ids": free if golden.mode == "fp32" else given["gentext0.output_ids"].flatten(),
        "saved.output_ids": free,
    }


@torch.no_grad()
def chat(golden: Golden, scenario: dict[str, Any], given: Tensors) -> Tensors:
    """A question of the official evaluation: pictures as ViT features, a prompt, text."""
    images = [golden.image(name) for name in scenario["images"]]
    settings = TextSettings(max_tokens=scenario["max_length"])
    recorder = _ContextRecorder(golden, given)
    with golden.as_recorded():
        recorder.sampler.chat(images, scenario["text"], settings, listener=recorder)
    return recorder.out | _ids(golden, given, golden.sampler.chat(images, scenario["text"], settings).ids)


@torch.no_grad()
def batch_t2i(golden: Golden, scenario: dict[str, Any], given: Tensors) -> Tensors:
    """Several prompts of several sizes, drawn in one batch."""
    requests = [Request([t], tuple(s)) for t, s in zip(scenario["texts"], scenario["sizes"], strict=True)]
    flow, grids = _flow(golden, scenario), [golden.sampler.grid(tuple(size)) for size in scenario["sizes"]]
    lens = [rows * columns for rows, columns in grids]
    recorder = _ContextRecorder(golden, given)
    recorder.sampler.share_branches = True  # the recording has two branches; a third one would be events of its own
    with golden.as_recorded():
        recorder.sampler.run_batch(requests, flow=flow, noise=_replayed_noise(given, *lens), listener=recorder)
    saved = golden.sampler.run_batch(requests, flow=flow, noise=_replayed_noise(given, *lens))
    latents = {f"saved.out_latent{i}": r.latent for i, r in enumerate(saved) if r.latent is not None}
    return recorder.out | latents


def _kv(out: Tensors, prefix: str, contexts: Sequence[Context]) -> None:
    for layer in range(contexts[0].layers):
        pairs = [c.keys_values(layer) for c in contexts]
        out[f"{prefix}.k{layer}"] = torch.cat([k for k, _ in pairs])
        out[f"{prefix}.v{layer}"] = torch.cat([v for _, v in pairs])
