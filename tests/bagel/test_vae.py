"""The autoencoder against the recorded upstream run (limit 1e-4 relative L2, in fp32) and its sizes from shapes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bagel.vae import AutoEncoder, VAEConfig, to_uint8

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
LIMIT = 1e-4


def rel_l2(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def vae() -> AutoEncoder:
    weights = load_file(GOLDEN / "checkpoint" / "ae.safetensors")
    model = AutoEncoder(VAEConfig.from_shapes({name: t.shape for name, t in weights.items()}))
    model.load_state_dict(weights, strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def trace() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "traces" / "vae.fp32.safetensors")


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    """The trace's input: image a after the VAE resize rule."""
    pixels = load_file(GOLDEN / "traces" / "resize.fp32.safetensors")["vae_resized_a"]
    return ((pixels.float() / 255 - 0.5) / 0.5).permute(2, 0, 1)[None]


def test_sizes_are_read_from_shapes(vae: AutoEncoder) -> None:
    assert vae.config == VAEConfig(32, (1, 1, 1, 1), 1, 16)
    assert vae.config.downsample == 8


def test_default_is_the_released_autoencoder() -> None:
    with torch.device("meta"):
        model = AutoEncoder(VAEConfig())
    state = model.state_dict()
    assert len(state) == 244
    assert sum(t.numel() for t in state.values()) == 83_819_683
    assert sum(t.numel() for n, t in state.items() if n.startswith("encoder.")) == 34_274_208
    assert VAEConfig.from_shapes({name: t.shape for name, t in state.items()}) == VAEConfig()


def test_wrong_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="FLUX autoencoder"):
        VAEConfig.from_shapes({"encoder.conv_in.weight": (32, 3, 3, 3)})


@torch.no_grad()
def test_moments_match(vae: AutoEncoder, trace: dict[str, torch.Tensor], image: torch.Tensor) -> None:
    assert rel_l2(torch.cat(vae.moments(image), 1), trace["moments"]) < LIMIT


@torch.no_grad()
def test_encode_is_sampled(vae: AutoEncoder, trace: dict[str, torch.Tensor], image: torch.Tensor) -> None:
    assert rel_l2(vae.encode(image, trace["noise"]), trace["z_sampled"]) < LIMIT
    assert rel_l2(vae.encode(image, torch.zeros_like(trace["noise"])), trace["z_mean"]) < LIMIT


@torch.no_grad()
def test_decode_matches(vae: AutoEncoder, trace: dict[str, torch.Tensor]) -> None:
    assert rel_l2(vae.decode(trace["vae_dec.z"]), trace["vae_dec.image"]) < LIMIT


def test_pixels_are_clamped_and_truncated() -> None:
    image = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0])
    assert to_uint8(image).tolist() == [0, 0, 127, 254, 255, 255]
