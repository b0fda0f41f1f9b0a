"""LPIPS against an independent computation with random weights, its file's faults, and its place in a report."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bagel_compress.build.limits import resolve
from bagel_compress.errors import RecipeError, TraceError
from bagel_compress.parity.compare import Candidate, compare
from bagel_compress.parity.lpips import Lpips
from bagel_compress.parity.network_metrics import Networks


def alexnet():
    """torchvision's `features`, with its numbers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
    )  # fmt: skip


@pytest.fixture(scope="module")
def weights():
    heads = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 192, 384, 256, 256))}
    return {f"features.{name}": tensor for name, tensor in alexnet().state_dict().items()} | heads


@pytest.fixture
def file(weights, tmp_path):
    save_file(weights, tmp_path / "lpips.safetensors")
    return tmp_path / "lpips.safetensors"


def pictures(height, width):
    rng = np.random.default_rng(1)
    return [torch.from_numpy(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(2)]


def by_hand(a, b, weights):
    """Zhang et al. 2018, equation 1, on the five ReLUs; the heads as sums in numpy."""
    states = []
    for picture in (a, b):
        x = picture.numpy().astype(np.float32) / 255 * 2 - 1
        x = (x - np.array([-0.030, -0.088, -0.188], np.float32)) / np.array([0.458, 0.448, 0.450], np.float32)
        x, kept = torch.from_numpy(x.transpose(2, 0, 1)[None]), []
        for index, layer in enumerate(alexnet()[:12]):
            x = layer(x)
            if index in (1, 4, 7, 9, 11):
                kept.append(x.detach().double().numpy()[0])
        states.append(kept)
    total = 0.0
    for stage, (f, g) in enumerate(zip(*states, strict=True)):
        f, g = (s / (np.sqrt((s**2).sum(0)) + 1e-10) for s in (f, g))
        head = weights[f"lin{stage}.model.1.weight"].double().numpy().reshape(-1, 1, 1)
        total += (head * (f - g) ** 2).sum(0).mean()
    return total


@pytest.mark.parametrize("size", [(31, 32), (48, 80)])
def test_it_is_what_the_paper_says(file, weights, size):
    a, b = pictures(*size)
    lpips = Lpips.open(file)
    assert lpips(a, b) == pytest.approx(by_hand(a, b, weights), rel=1e-4)
    assert lpips(a, b) > 0.01
    assert lpips(a, a) == 0.0


def test_a_wrong_file_is_named(weights, tmp_path):
    with pytest.raises(TraceError, match="cannot be read"):
        Lpips.open(tmp_path / "none.safetensors")
    save_file({n: t for n, t in weights.items() if n != "features.8.bias"}, tmp_path / "a.safetensors")
    with pytest.raises(TraceError, match=r"features\.8\.bias is missing, expected \[256\]"):
        Lpips.open(tmp_path / "a.safetensors")
    save_file(weights | {"lin0.model.1.weight": torch.rand(1, 3, 1, 1)}, tmp_path / "b.safetensors")
    with pytest.raises(TraceError, match=r"is \[1, 3, 1, 1\], expected \[1, 64, 1, 1\]"):
        Lpips.open(tmp_path / "b.safetensors")


def test_a_limit_of_a_recipe_holds_breaks_and_needs_the_weights(reference, trace_file, file):
    def judged(limit, lpips):
        limits = resolve("lossless", {"image.lpips": limit})
        return compare(
            Candidate(reference, "x", "0", "lossless", limits), [trace_file], networks=Networks(lpips=lpips)
        ).report

    with pytest.raises(RecipeError, match="give them with --lpips FILE"):
        judged(0.1, None)
    report = judged(0.0, Lpips.open(file))
    assert report.passed
    assert {c.metrics["image.lpips"] for c in report.cases if c.has_image} == {0.0}
    assert "image.lpips" not in " ".join(report.notes)
    [sentence] = judged(-1.0, Lpips.open(file)).broken  # no picture is nearer than equal
    assert "image.lpips is 0, above the limit of -1" in sentence
