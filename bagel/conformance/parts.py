"""Replays the scenarios that are not runs of the sampler: VAE, resize tables, small pieces, the training forward."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from bagel.config import ResizeRule
from bagel.conformance.golden import Golden, Tensors, levels
from bagel.flow import schedule
from bagel.inputs import grid_ids, resized, resized_sides, to_rgb, to_tensor
from bagel.layers import inverse_frequencies
from bagel.model import TimeEmbedder, sincos_table
from bagel.training import PackedBatch, forward
from bagel.vit import patchify


def vae(golden: Golden, scenario: dict[str, Any], given: Tensors) -> Tensors:
    sampler = golden.sampler
    vae, config = sampler.vae, sampler.vae.config
    pixels = to_tensor(resized(to_rgb(golden.image(scenario["image"])), sampler.bagel.config.vae_rule))[None]
    with torch.no_grad():
        mean, logvar = vae.moments(pixels)
        sampled = vae.encode(pixels, given["noise"].float())
        z_mean = config.scale_factor * (mean - config.shift_factor)
        decoded = vae.decode(given["vae_dec.z"].float())
    return {
        "moments": torch.cat([mean, logvar], dim=1),
        "noise": given["noise"],
        "z_sampled": sampled,
        "z_mean": z_mean,
        "packed_latent": sampler.bagel.pack_latent(z_mean[0]),
        "vae_dec.z": given["vae_dec.z"],
        "vae_dec.image": decoded,
    }


def resize(golden: Golden, scenario: dict[str, Any], given: Tensors) -> Tensors:
    out: Tensors = {}
    cap = golden.manifest["checkpoint"]["max_pixels"]
    for name, args in scenario["tables"]:
        longest, shortest, stride = args
        rule = ResizeRule(longest, shortest, stride, cap)
        sides = given[name][:, :2].tolist()
        out[name] = torch.tensor([[w, h, *resized_sides(w, h, rule)] for w, h in sides])
    for name in given:
        if match := re.fullmatch(r"pos_(\w+)_h(\d+)_w(\d+)_p(\d+)_m(\d+)", name):
            height, width, patch, side = map(int, match.groups()[1:])
            out[name] = grid_ids(height // patch, width // patch, side, match[1] == "interpolate")
    config = golden.sampler.bagel.config
    for name in golden.manifest["images"]:
        image = to_rgb(golden.image(name))
        by_vae = resized(image, config.vae_rule)
        out[f"vae_resized_{name}"] = levels(by_vae)
        out[f"vit_resized_{name}"] = levels(resized(image, config.vit_rule))
        out[f"vit_after_vae_resized_{name}"] = levels(resized(by_vae, config.vit_rule))
        out[f"vit_tensor_{name}_slice8x8"] = to_tensor(resized(image, config.vit_rule))[:, :8, :8]
    return out


def pieces(golden: Golden, scenario: dict[str, Any], given: Tensors) -> Tensors:
    model, text = golden.sampler.bagel, golden.sampler.text
    llm = model.config.llm
    ids = scenario["special_ids"]
    out: Tensors = {
        "t": given["t"],
        "t_freq": TimeEmbedder.features(given["t"]),
        "t_embed": model.time_embedder(given["t"]),
        "rope_inv_freq": inverse_frequencies(llm.head_dim, llm.rope_theta),
        "tokenizer.special_ids": torch.tensor([text.bos, text.eos, text.image_start, text.image_end]),
        "tokenizer.special_ids.expected": torch.tensor(
            [ids["bos_token_id"], ids["eos_token_id"], ids["start_of_image"], ids["end_of_image"]]
        ),
        "tokenizer.len": torch.tensor(text.tokenizer.get_vocab_size(with_added_tokens=True)),
        "tokenizer.len.expected": torch.tensor(scenario["len_tokenizer"]),
    }
    for i, entry in enumerate(scenario["tokenizer"]):
        out[f"tokenizer.ids{i}"] = torch.tensor(text.encode(entry["text"]))
        out[f"tokenizer.ids{i}.expected"] = torch.tensor(entry["ids"])
        out[f"tokenizer.text{i}"] = _codepoints(text.decode(entry["ids"]))
        out[f"tokenizer.text{i}.expected"] = _codepoints(entry["decoded"])
    for name in given:
        if match := re.fullmatch(r"sincos_d(\d+)_g(\d+)", name):
            out[name] = sincos_table(int(match[2]), int(match[1]))
        if match := re.fullmatch(r"sched_n(\d+)_shift([\d.]+)", name):
            out[name] = schedule(int(match[1]), float(match[2]))
    return out


def _codepoints(text: str) -> Tensor:
    return torch.tensor([ord(c) for c in text], dtype=torch.int64)


def train(golden: Golden, scenario: dict[str, Any], given: Tensors) -> Tensors:
    with torch.no_grad():
        losses = forward(golden.sampler.bagel, recorded_batch(golden, scenario, given), given["noise"])
    computed = {"noise": given["noise"], "last_hidden_state": losses.hidden, "ce": losses.ce, "mse": losses.mse}
    return computed | {name: value for name, value in given.items() if name.startswith("in.")}


def recorded_batch(golden: Golden, scenario: dict[str, Any], given: Tensors) -> PackedBatch:
    """The batch of a recorded training forward."""
    config, model = golden.sampler.bagel.config, golden.sampler.bagel
    lists = scenario["runs"][golden.mode]["info"]["lists"]
    patch = config.latent_patch_size
    latents = [
        model.pack_latent(latent[:, : h * patch, : w * patch])
        for latent, (h, w) in zip(given["in.padded_latent"], lists["patchified_vae_latent_shapes"], strict=True)
    ]
    images = [to_tensor(resized(to_rgb(golden.image(n)), config.vit_rule)) for n in golden.manifest["images"]]
    return PackedBatch(
        sample_lens=lists["sample_lens"],
        visible=[given[f"in.attn_visible{i}"] for i in range(len(lists["sample_lens"]))],
        positions=given["in.packed_position_ids"],
        text_ids=given["in.packed_text_ids"],
        text_rows=given["in.packed_text_indexes"],
        vit_patches=torch.cat([patchify(i, config.vit.patch_size) for i in images]),
        vit_ids=given["in.packed_vit_position_ids"],
        vit_rows=given["in.packed_vit_token_indexes"],
        vit_lens=given["in.vit_token_seqlens"].tolist(),
        latents=torch.cat(latents),
        latent_ids=given["in.packed_latent_position_ids"],
        latent_rows=given["in.packed_vae_token_indexes"],
        timesteps=given["in.packed_timesteps"],
        mse_rows=given["in.mse_loss_indexes"],
        ce_rows=given["in.ce_loss_indexes"],
        labels=given["in.packed_label_ids"],
    )
