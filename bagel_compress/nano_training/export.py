"""Writes a trained model as a checkpoint folder in the official layout, so that everything that loads BAGEL loads it.

`ema.safetensors` in bf16 with the official names, `ae.safetensors` in fp32, the Qwen2 and SigLIP configs (with one
layer too many in the latter, as upstream has it), the tokenizer's files, and a `config.json` that carries what
upstream hard-codes: resize rules, table sides and the autoencoder's sizes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from bagel.config import ResizeRule
from bagel.layout import expected_tensors
from bagel.loading import parameter_path
from bagel.model import Bagel
from bagel.vae import AutoEncoder, VAEConfig
from bagel_compress.nano_training import tokens
from bagel_compress.nano_training.model import CONFIG


def save(folder: Path, model: Bagel, vae: AutoEncoder, tokenizer: Tokenizer) -> None:
    """Writes the whole folder; files that are there are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    values = model.state_dict()
    names = expected_tensors(CONFIG.sizes)
    weights = {name: values[parameter_path(name)].to(torch.bfloat16).contiguous() for name in names}
    save_file(weights, folder / "ema.safetensors", metadata={"format": "pt"})
    save_vae(folder, vae)
    tokens.save(tokenizer, folder)
    llm, vit = _llm_config(tokenizer), _vit_config()
    _write(folder / "llm_config.json", llm)
    _write(folder / "vit_config.json", vit)
    _write(folder / "config.json", _config(llm, vit, vae.config))
    _write(
        folder / "generation_config.json",
        {"eos_token_id": [llm["eos_token_id"], llm["bos_token_id"]], "do_sample": False},
    )


def save_vae(folder: Path, vae: AutoEncoder) -> None:
    """Writes `ae.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: t.detach().float().contiguous() for name, t in vae.state_dict().items()}
    save_file(weights, folder / "ae.safetensors", metadata={"format": "pt"})


def _llm_config(tokenizer: Tokenizer) -> dict[str, Any]:
    llm = CONFIG.llm
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "hidden_act": "silu",
        "hidden_size": llm.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": llm.intermediate_size,
        "max_position_embeddings": 32768,
        "max_window_layers": llm.num_layers,
        "model_type": "qwen2",
        "num_attention_heads": llm.num_heads,
        "num_hidden_layers": llm.num_layers,
        "num_key_value_heads": llm.num_kv_heads,
        "qk_norm": True,
        "rms_norm_eps": llm.rms_norm_eps,
        "rope_theta": llm.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": llm.vocab_size,
    }


def _vit_config() -> dict[str, Any]:
    vit = CONFIG.vit
    return {
        "attention_dropout": 0.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": vit.hidden_size,
        "image_size": CONFIG.vit_max_patches * vit.patch_size,
        "intermediate_size": vit.intermediate_size,
        "layer_norm_eps": vit.layer_norm_eps,
        "model_type": "siglip_vision_model",
        "num_attention_heads": vit.num_heads,
        "num_channels": vit.num_channels,
        "num_hidden_layers": vit.num_layers + 1,
        "patch_size": vit.patch_size,
    }


def _config(llm: dict[str, Any], vit: dict[str, Any], vae: VAEConfig) -> dict[str, Any]:
    return {
        "architectures": ["BagelForConditionalGeneration"],
        "model_type": "bagel",
        "visual_gen": True,
        "visual_und": True,
        "latent_patch_size": CONFIG.latent_patch_size,
        "max_latent_size": CONFIG.max_latent_size,
        "vit_max_num_patch_per_side": CONFIG.vit_max_patches,
        "default_image_size": CONFIG.default_size,
        "connector_act": "gelu_pytorch_tanh",
        "interpolate_pos": False,
        "timestep_shift": CONFIG.timestep_shift,
        "llm_config": {**llm, "layer_module": "Qwen2MoTDecoderLayer"},
        "vit_config": vit,
        "vae_config": {
            "in_channels": vae.in_channels, "out_ch": vae.out_channels, "ch": vae.ch, "ch_mult": list(vae.ch_mult),
            "num_res_blocks": vae.num_res_blocks, "z_channels": vae.z_channels, "downsample": vae.downsample,
            "scale_factor": vae.scale_factor, "shift_factor": vae.shift_factor,
        },
        "vae_transform": _transform(CONFIG.vae_rule),
        "vit_transform": _transform(CONFIG.vit_rule),
    }  # fmt: skip


def _transform(rule: ResizeRule) -> dict[str, int]:
    return {"max_image_size": rule.max_size, "min_image_size": rule.min_size, "image_stride": rule.stride}


def _write(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
