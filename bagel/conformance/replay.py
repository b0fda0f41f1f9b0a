"""Replays the sampling scenarios of a golden folder and gives every tensor under its recorded name.

The replay is plain: nothing is skipped and nothing is shared, so that each intermediate exists. A second run, with all
savings on, is given as `saved.*` and must agree with the same recording.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from bagel.conformance.golden import Golden, Tensors, levels
from bagel.conformance.packing import block_rows, constant_positions, lengths, merged_slots, running_positions
from bagel.context import Context
from bagel.flow import FlowSettings, schedule
from bagel.inputs import grid_ids, resized, to_rgb, to_tensor
from bagel.model import Tap
from bagel.sampler import Branches, Noise, Sampler, TextSettings, Turn

# Arguments that a recording does not repeat because they are the official defaults (sampler method; text decoding).
SAMPLER_DEFAULTS: dict[str, Any] = {
    "num_timesteps": 24, "timestep_shift": 1.0, "cfg_text_scale": 1.0, "cfg_img_scale": 1.0,
    "cfg_interval": (0.0, 1.0), "cfg_renorm_min": 0.0, "cfg_renorm_type": "global",
}  # fmt: skip
MAX_THINK_TOKENS = 1000


class _Recorder(Branches):
    """Branches that put down every event under the recorded names."""

    def __init__(self, sampler: Sampler, out: Tensors, batch: int = 1, plain: bool = True) -> None:
        super().__init__(sampler, batch, plain)
        self._out, self._event, self._model = out, 0, sampler.bagel
        self.noises: list[Tensor] = []
        self._moments: list[Tensor] = []

    def prefill_text(self, contexts: list[Context], texts: Sequence[str]) -> None:
        prefix = self._begin("text")
        turns = [self._sampler.text.turn(t) for t in texts]
        lens = [len(t) for t in turns]
        query, cached = merged_slots(contexts, lens)
        self._out |= {
            f"{prefix}.text_token_lens": torch.tensor(lens),
            f"{prefix}.packed_text_ids": torch.tensor([i for t in turns for i in t]),
            f"{prefix}.packed_text_position_ids": running_positions(contexts, lens),
            f"{prefix}.packed_text_indexes": query,
            f"{prefix}.packed_key_value_indexes": cached,
            f"{prefix}.key_values_lens": lengths(contexts),
        }
        self._model.prefill_text(contexts, turns, self._tap(prefix))
        self._end(prefix, contexts)

    def prefill_vit(self, contexts: list[Context], images: list[Tensor]) -> None:
        prefix = self._begin("vit")
        patch = self._model.config.vit.patch_size
        lens = [i.shape[1] * i.shape[2] // patch**2 for i in images]
        self._block(prefix, contexts, lens, "packed_vit_token_indexes")
        self._out[f"{prefix}.vit_token_seqlens"] = torch.tensor(lens)
        self._model.prefill_vit(contexts, images, self._sampler.wrap, self._tap(prefix))
        self._end(prefix, contexts)

    def add_image(self, images: Sequence[Image.Image], noise: Noise | None) -> None:
        pixels = [to_tensor(resized(i, self._model.config.vae_rule))[None] for i in images]
        with torch.no_grad():
            self._moments = [torch.cat(self._sampler.vae.moments(p), dim=1) for p in pixels]
        super().add_image(images, noise)

    def prefill_latent(self, contexts: list[Context], latents: list[Tensor]) -> None:
        prefix = self._begin("vae")
        self._out[f"{prefix}.vae_moments"] = torch.cat(self._moments)
        patch = self._model.config.latent_patch_size
        lens = [latent.shape[1] * latent.shape[2] // patch**2 for latent in latents]
        self._block(prefix, contexts, lens, "packed_vae_token_indexes")
        self._out[f"{prefix}.packed_timesteps"] = torch.zeros(1)
        self._out[f"{prefix}.vae_noise"] = self.noises[-1]
        self._model.prefill_latent(contexts, latents, self._sampler.wrap, self._tap(prefix))
        self._end(prefix, contexts)

    def _block(self, prefix: str, contexts: list[Context], lens: list[int], rows_name: str) -> None:
        full = [n + 2 for n in lens]
        slots, cached = merged_slots(contexts, full)
        wrappers, rows = block_rows(lens)
        self._out |= {
            f"{prefix}.packed_text_ids": torch.tensor(list(self._sampler.wrap) * len(lens)),
            f"{prefix}.packed_text_indexes": wrappers,
            f"{prefix}.{rows_name}": rows,
            f"{prefix}.packed_position_ids": constant_positions(contexts, full),
            f"{prefix}.packed_seqlens": torch.tensor(full),
            f"{prefix}.packed_indexes": slots,
            f"{prefix}.packed_key_value_indexes": cached,
            f"{prefix}.key_values_lens": lengths(contexts),
        }

    def _begin(self, kind: str) -> str:
        self._event += 1
        return f"ctx{self._event - 1}_{kind}"

    def _tap(self, prefix: str) -> Tap:
        return lambda name, tensor: self._out.__setitem__(f"{prefix}.{name}", tensor)

    def _end(self, prefix: str, contexts: list[Context]) -> None:
        self._out[f"{prefix}.out_kv_lens"] = lengths(contexts)
        self._out[f"{prefix}.out_ropes"] = torch.tensor([c.rope for c in contexts])


def infer(golden: Golden, scenario: dict[str, Any], given: Tensors) -> Tensors:
    sampler, kwargs = golden.sampler, scenario["kwargs"]
    out: Tensors = {}
    turns = _turns(golden, scenario)
    output = "text" if kwargs.get("understanding_output") else "image"
    think = bool(kwargs.get("think"))
    text = TextSettings(max_tokens=kwargs.get("max_think_token_n", MAX_THINK_TOKENS))
    branches = _Recorder(sampler, out)
    noise = _replayed_noise(given, branches)
    with golden.as_recorded():
        size = sampler.read(branches, turns, output, think, noise)
    pictures = [turn for turn in turns if not isinstance(turn, str)]
    if pictures:
        out["image_after_vae_resize"] = levels(resized(to_rgb(pictures[-1]), sampler.bagel.config.vae_rule))
    if output == "text" or think:
        _kv(out, "gentext0.kv_prefill", branches.cond)
        _text(golden, out, branches.cond, text, given)
    if output == "text":
        run = sampler.run(turns, output="text", think=think, text=text)
        return out | {"saved.output_ids": torch.tensor(run.ids)}
    if think:
        with golden.as_recorded():
            branches.add_thoughts([sampler.text.answer(out["gentext0.output_ids"].tolist())])
    flow = _flow(golden, scenario)
    grid = sampler.grid(size or tuple(kwargs.get("image_shapes", (1024, 1024))))
    _denoise(golden, out, branches, [grid], flow, given)
    replayed = iter([*branches.noises, given["gen.packed_init_noises"]])
    run = sampler.run(
        turns, think=think, size=tuple(kwargs.get("image_shapes", (1024, 1024))), flow=flow, text=text,
        noise=lambda _: next(replayed),
    )  # fmt: skip
    assert run.latent is not None
    assert run.image is not None
    return out | {"saved.out_latent0": run.latent, "out_image": levels(run.image)}


def _turns(golden: Golden, scenario: dict[str, Any]) -> list[Turn]:
    if scenario["kind"] == "interleave":
        return [golden.image(i[4:]) if i.startswith("img:") else i for i in scenario["inputs"]]
    image = [] if scenario.get("image") is None else [golden.image(scenario["image"])]
    return [*image, *([] if scenario.get("text") is None else [scenario["text"]])]


def _replayed_noise(given: Tensors, branches: _Recorder) -> Noise:
    names = sorted((n for n in given if n.endswith("_vae.vae_noise")), key=lambda n: int(n[3 : n.index("_")]))
    waiting = iter(names)

    def noise(shape: tuple[int, ...]) -> Tensor:
        value = given[next(waiting)].float()
        assert tuple(value.shape) == shape, f"the recording drew {tuple(value.shape)}, the sampler asked for {shape}"
        branches.noises.append(value)
        return value

    return noise


def _flow(golden: Golden, scenario: dict[str, Any]) -> FlowSettings:
    resolved = scenario["runs"][golden.mode]["info"].get("generate_image", {})
    values = {**SAMPLER_DEFAULTS, **scenario["kwargs"], **resolved}
    values = {k: v for k, v in values.items() if k in SAMPLER_DEFAULTS}
    return FlowSettings(**{**values, "cfg_interval": tuple(values["cfg_interval"])})


def chat(golden: Golden, scenario: dict[str, Any], given: Tensors) -> Tensors:
    sampler = golden.sampler
    out: Tensors = {}
    branches = _Recorder(sampler, out, plain=False)
    images = [golden.image(name) for name in scenario["images"]]
    with golden.as_recorded():
        for image in images:
            pixels = to_tensor(resized(to_rgb(image), sampler.bagel.config.vit_rule))
            branches.prefill_vit(branches.cond, [pixels])
        branches.prefill_text(branches.cond, [scenario["text"]])
    settings = TextSettings(max_tokens=scenario["max_length"])
    _kv(out, "gentext0.kv_prefill", branches.cond)
    _text(golden, out, branches.cond, settings, given)
    return out | {"saved.output_ids": torch.tensor(sampler.chat(images, scenario["text"], settings).ids)}


def batch_t2i(golden: Golden, scenario: dict[str, Any], given: Tensors) -> Tensors:
    sampler = golden.sampler
    out: Tensors = {}
    branches = _Recorder(sampler, out, batch=len(scenario["texts"]), plain=False)
    with golden.as_recorded():
        branches.add_text(scenario["texts"])
    grids = [sampler.grid(tuple(size)) for size in scenario["sizes"]]
    _denoise(golden, out, branches, grids, _flow(golden, scenario), given)
    x = given["gen.packed_init_noises"]
    for step in sampler.denoise(branches, x, grids, _flow(golden, scenario)):
        x = step.x_next
    for i, part in enumerate(x.split([r * c for r, c in grids])):
        out[f"saved.out_latent{i}"] = part
    return out


def _text(golden: Golden, out: Tensors, contexts: list[Context], settings: TextSettings, given: Tensors) -> None:
    """Decodes along the recorded ids (an early flip would make all later logits incomparable); in fp32 also freely."""
    sampler = golden.sampler
    recorded = given["gentext0.output_ids"].flatten().tolist()
    forks = [c.fork() for c in contexts]
    with golden.as_recorded():
        rows = [sampler.bagel.next_logits(forks, [token]) for token in recorded]
    logits = torch.cat(rows)
    top2 = logits.float().topk(2, dim=-1).values
    free = sampler.decode_text(contexts, settings)[0] if golden.mode == "fp32" else recorded
    out |= {
        "gentext0.start_position_ids": torch.tensor([c.rope for c in contexts]),
        "gentext0.start_tokens": torch.tensor([sampler.text.bos] * len(contexts)),
        "gentext0.logits_first8": logits[:8],
        "gentext0.top2_margin": top2[:, 0] - top2[:, 1],
        "gentext0.argmax_ids": logits.argmax(-1),
        "gentext0.output_ids": torch.tensor(free),
    }


def _denoise(
    golden: Golden, out: Tensors, branches: _Recorder, grids: list[tuple[int, int]], flow: FlowSettings, given: Tensors
) -> None:
    sampler = golden.sampler
    text_dropped, image_dropped = branches.text_dropped, branches.image_dropped
    for name, contexts in (("kv_cond", branches.cond), ("kv_cfg_text", text_dropped), ("kv_cfg_img", image_dropped)):
        _kv(out, name, contexts)
    lens = [r * c for r, c in grids]
    full = [n + 2 for n in lens]
    wrappers, rows = block_rows(lens)
    out |= {"gen.packed_text_indexes": wrappers, "gen.packed_vae_token_indexes": rows}
    for prefix, contexts, name in (
        ("gen.", branches.cond, "packed_indexes"),
        ("gen.cfg_text_", text_dropped, "packed_query_indexes"),
        ("gen.cfg_img_", image_dropped, "packed_query_indexes"),
    ):
        slots, cached = merged_slots(contexts, full)
        out |= {
            f"{prefix}packed_position_ids": constant_positions(contexts, full),
            f"{prefix}key_values_lens": lengths(contexts),
            f"{prefix}{name}": slots,
            f"{prefix}packed_key_value_indexes": cached,
        }
    ids = [grid_ids(r, c, sampler.bagel.config.max_latent_size, sampler.bagel.config.interpolate_pos) for r, c in grids]
    x = out["gen.packed_init_noises"] = given["gen.packed_init_noises"]
    out |= {
        "gen.packed_vae_position_ids": torch.cat(ids),
        "gen.packed_seqlens": torch.tensor(full),
        "gen.packed_text_ids": torch.tensor(list(sampler.wrap) * len(lens)),
        "gen.timesteps_full": schedule(flow.num_timesteps, flow.timestep_shift),
    }
    taps: Tensors = {}
    times = schedule(flow.num_timesteps, flow.timestep_shift)
    for index in range(len(times) - 1):
        at = f"step{index}"
        with golden.as_recorded():
            step = sampler.step(branches, x, times, index, grids, flow, None if index else taps.__setitem__, plain=True)
        out |= {f"{at}.x_t": step.x, f"{at}.t": step.t, f"{at}.v_cond": step.v_cond, f"{at}.v": step.v}
        if step.v_text is not None:
            out[f"{at}.v_cfg_text"] = step.v_text
        if step.v_image is not None:
            out[f"{at}.v_cfg_img"] = step.v_image
        # bf16 roundings that flip would grow from step to step: go on from the recorded velocity there.
        forced = golden.mode == "bf16" and f"{at}.v" in given
        x = sampler.euler(x, given[f"{at}.v"], times[index] - times[index + 1]) if forced else step.x_next
    out |= {f"step0.{n}" if n == "time_embed" else f"step0.cond.{n}": value for n, value in taps.items()}
    for i, (part, grid) in enumerate(zip(x.split(lens), grids, strict=True)):
        out[f"gen.out_latent{i}"] = part
        if i == 0:
            z = sampler.bagel.unpack_latent(part, *grid)[None]
            with torch.no_grad():
                out |= {"vae_dec.z": z, "vae_dec.image": sampler.vae.decode(z)}


def _kv(out: Tensors, prefix: str, contexts: Sequence[Context]) -> None:
    for layer in range(contexts[0].layers):
        pairs = [c.keys_values(layer) for c in contexts]
        out[f"{prefix}.k{layer}"] = torch.cat([k for k, _ in pairs])
        out[f"{prefix}.v{layer}"] = torch.cat([v for _, v in pairs])
