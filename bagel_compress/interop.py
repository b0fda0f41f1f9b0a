"""Opens a build in the official repository's model: `Bagel` of ByteDance-Seed/Bagel, with the weights as stored.

    # in a clone of the official repository
    from bagel_compress.interop import official_inferencer
    inferencer = official_inferencer("out/nf4")
    inferencer(text="a red teapot on a wooden table")["image"].save("teapot.png")

NF4 and INT8 weights are put into bitsandbytes' modules, which the official code's modes 2 and 3 make at every start;
weights of other formats into this package's run-time modules; tensors that are no linears are decoded. Nothing is
quantised again. The official code must be importable (its folder is the working directory or on the path). The VAE
stays on the CPU, where the official sampler encodes and decodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bagel_compress.build.artifact import Artifact
from bagel_compress.codecs.base import Codec, Unit
from bagel_compress.codecs.constants import NF4_BLOCK
from bagel_compress.codecs.int8 import Int8
from bagel_compress.codecs.nf4 import Nf4
from bagel_compress.errors import MissingExtraError
from bagel_compress.io.tensor_spec import TensorSpec
from bagel_compress.run.load import downloaded, runs_coded

if TYPE_CHECKING:
    import torch

OFFICIAL = "https://github.com/ByteDance-Seed/Bagel"
OUTLIER = 6.0  # of LLM.int8: columns with a larger value of x stay in 16 bits
Biases = Mapping[str, "torch.Tensor"]


def official_model(build: str | Path | Artifact, device: str | torch.device | None = None) -> Any:
    """The official `Bagel`, ready to sample. `build`: an artifact, its folder or a Hub id; `device` None: CUDA or CPU.

    Raises MissingExtraError if the official code or bitsandbytes cannot be imported, ArtifactError if the folder is no
    build.
    """
    import torch

    artifact = _opened(build)
    bagel = _skeleton(artifact)
    _fill(bagel, artifact, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    return bagel.eval()


def official_inferencer(build: str | Path | Artifact, device: str | torch.device | None = None) -> Any:
    """The official `InterleaveInferencer` over `official_model`, with its VAE, tokenizer and transforms."""
    artifact = _opened(build)
    bagel = official_model(artifact, device)
    from data.data_utils import add_special_tokens
    from data.transforms import ImageTransform
    from inferencer import InterleaveInferencer
    from modeling.qwen2 import Qwen2Tokenizer

    tokenizer, new_token_ids, _ = add_special_tokens(Qwen2Tokenizer.from_pretrained(str(artifact.path)))
    config = _config(artifact)
    vae, vit = (
        ImageTransform(rule.max_size, rule.min_size, rule.stride) for rule in (config.vae_rule, config.vit_rule)
    )
    return InterleaveInferencer(bagel, _autoencoder(artifact), tokenizer, vae, vit, new_token_ids)


def _opened(build: str | Path | Artifact) -> Artifact:
    if isinstance(build, Artifact):
        return build
    return Artifact.open(build if Path(build).exists() else downloaded(str(build)))


def _config(artifact: Artifact) -> Any:
    from bagel.loading import read_config, shapes_of, tensor_names

    shapes = {spec.name: spec.shape for unit in artifact.units() for spec in unit.specs}
    return read_config(
        artifact.path, shapes, shapes_of(dict.fromkeys(tensor_names(artifact.vae_path), artifact.vae_path))
    )


def _skeleton(artifact: Artifact) -> Any:
    """The official model without weights, with the settings that the official app hard-codes."""
    try:
        import modeling.bagel as official
        from accelerate import init_empty_weights
    except ImportError as error:
        raise MissingExtraError(
            f"the official BAGEL code cannot be imported ({error}); clone {OFFICIAL}, install its requirements, and run"
            " this in its folder."
        ) from None
    llm = official.Qwen2Config.from_json_file(str(artifact.path / "llm_config.json"))
    llm.qk_norm, llm.tie_word_embeddings, llm.layer_module = True, False, "Qwen2MoTDecoderLayer"
    vit = official.SiglipVisionConfig.from_json_file(str(artifact.path / "vit_config.json"))
    vit.rope = False
    vit.num_hidden_layers -= 1
    config = _config(artifact)
    settings = official.BagelConfig(
        visual_gen=True, visual_und=True, llm_config=llm, vit_config=vit, vae_config=_vae_params(artifact),
        vit_max_num_patch_per_side=config.vit_max_patches, connector_act="gelu_pytorch_tanh",
        latent_patch_size=config.latent_patch_size, max_latent_size=config.max_latent_size,
    )  # fmt: skip
    with init_empty_weights():
        bagel = official.Bagel(official.Qwen2ForCausalLM(llm), official.SiglipVisionModel(vit), settings)
        bagel.vit_model.vision_model.embeddings.convert_conv2d_to_linear(vit, meta=True)
    return bagel


def _fill(bagel: Any, artifact: Artifact, device: torch.device) -> None:
    """Biases first, so that a linear's module is made whole; then every unit in the order of the shards."""
    import torch

    biases: dict[str, torch.Tensor] = {}
    for name, entry in artifact.manifest.units.items():
        for tensor in entry.tensors:
            if tensor.endswith(".bias"):
                biases[tensor.removesuffix("bias") + "weight"] = artifact.decode(name)[tensor].to(device)
    for name in artifact.manifest.units:
        unit, codec = artifact.unit(name), artifact.codec(name)
        if runs_coded(codec, unit):
            for tensor, module in _modules(codec, unit, artifact.parts(name), biases, device).items():
                bagel.set_submodule(tensor.removesuffix(".weight"), module)
            continue
        for tensor, value in artifact.decode(name).items():
            path, _, leaf = tensor.rpartition(".")
            value = value.to(device, torch.bfloat16)
            setattr(bagel.get_submodule(path), leaf, torch.nn.Parameter(value, requires_grad=False))
    for module in bagel.modules():  # the rotary frequencies, which are computed and not stored
        module._buffers |= {key: value.to(device) for key, value in module._buffers.items() if value is not None}


def _modules(
    codec: Codec, unit: Unit, parts: Mapping[str, torch.Tensor], biases: Biases, device: torch.device
) -> dict[str, torch.nn.Module]:
    """Run-time modules of a unit, on the device."""
    make = _int8 if isinstance(codec, Int8) and codec.dialect == "bitsandbytes" else None
    if isinstance(codec, Nf4) and (device.type != "cpu" or unit.specs[0].shape[1] % NF4_BLOCK == 0):
        make = _nf4  # bitsandbytes' kernel for the CPU (0.50.2) takes only rows of whole blocks
    if make is not None:
        return {spec.name: make(spec, parts, biases.get(spec.name), device) for spec in unit.specs}
    return codec.linears(unit, {part: value.to(device) for part, value in parts.items()}, biases)


def _nf4(spec: TensorSpec, parts: Mapping[str, torch.Tensor], bias: torch.Tensor | None, device: torch.device) -> Any:
    """bitsandbytes' Linear4bit over stored codes."""
    import torch

    bnb, (rows, columns) = _bitsandbytes(), spec.shape
    stats = {name.removeprefix(f"{spec.name}."): part for name, part in parts.items() if name != spec.name}
    layer = bnb.nn.Linear4bit(
        columns, rows, bias is not None, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
    )
    layer.weight = bnb.nn.Params4bit.from_prequantized(parts[spec.name], stats, device=str(device), module=layer)
    return _with_bias(layer, bias)


def _int8(spec: TensorSpec, parts: Mapping[str, torch.Tensor], bias: torch.Tensor | None, device: torch.device) -> Any:
    """bitsandbytes' Linear8bitLt (LLM.int8) over stored codes."""
    bnb, (rows, columns) = _bitsandbytes(), spec.shape
    codes = parts[spec.name].to(device)
    scales = parts[spec.name.removesuffix("weight") + "SCB"].to(device)
    layer = bnb.nn.Linear8bitLt(
        columns, rows, bias is not None, has_fp16_weights=False, threshold=OUTLIER, device="meta"
    )
    layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    return _with_bias(layer, bias)


def _with_bias(layer: Any, bias: torch.Tensor | None) -> Any:
    import torch

    if bias is not None:
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    return layer


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError:
        raise MissingExtraError(
            "NF4 and INT8 builds run in the official model on bitsandbytes; pip install 'bagel-compress[bnb]'."
        ) from None
    return bitsandbytes


def _autoencoder(artifact: Artifact) -> Any:
    """The official VAE, in fp32 on the CPU: the official sampler encodes and decodes there."""
    from modeling.autoencoder import AutoEncoder
    from safetensors.torch import load_file

    vae = AutoEncoder(_vae_params(artifact))
    vae.load_state_dict({name: value.float() for name, value in load_file(artifact.vae_path).items()}, assign=True)
    return vae.eval()


def _vae_params(artifact: Artifact) -> Any:
    """The VAE's sizes in the official class; its loader has only the released ones."""
    from modeling.autoencoder import AutoEncoderParams

    from bagel.loading import shapes_of, tensor_names, vae_config

    files = dict.fromkeys(tensor_names(artifact.vae_path), artifact.vae_path)
    sizes = vae_config(artifact.path, shapes_of(files))
    return AutoEncoderParams(
        resolution=256, in_channels=sizes.in_channels, downsample=sizes.downsample, ch=sizes.ch,
        out_ch=sizes.out_channels, ch_mult=list(sizes.ch_mult), num_res_blocks=sizes.num_res_blocks,
        z_channels=sizes.z_channels, scale_factor=sizes.scale_factor, shift_factor=sizes.shift_factor,
    )  # fmt: skip
