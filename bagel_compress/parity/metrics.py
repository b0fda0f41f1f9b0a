"""Distances between outputs of a compressed model and of its reference: small pure functions on torch tensors.

The first argument is the compressed model's value ("found"), the second the reference's. Everything is computed in
float64, so that a distance of zero means equality. Pictures are uint8 [H, W, 3]. None of these metrics needs a network;
LPIPS and CLIP do, and have modules of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_SIGMA, SSIM_RADIUS = 1.5, 5  # Wang et al. 2004: 11x11 Gaussian window, sigma 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03  # Wang et al. 2004
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang, Simoncelli and Bovik 2003, finest scale first


def rel_l2(found: Tensor, reference: Tensor) -> float:
    """||found - reference|| / ||reference||; 0 if both are zero, infinite if only the reference is."""
    difference = (found.double() - reference.double()).norm().item()
    size = reference.double().norm().item()
    if size == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return difference / size


def cosine(found: Tensor, reference: Tensor) -> float:
    """Cosine of the angle between the flattened tensors; equal tensors give exactly 1, a single zero one gives 0."""
    a, b = found.double().flatten(), reference.double().flatten()
    if torch.equal(a, b):
        return 1.0
    size = (a.norm() * b.norm()).item()
    return 0.0 if size == 0.0 else (a @ b).item() / size


def gain(found: Tensor, reference: Tensor) -> float:
    """The factor that best maps the reference to what was found: <found, reference> / <reference, reference>."""
    a, b = found.double().flatten(), reference.double().flatten()
    size = (b @ b).item()
    return 1.0 if size == 0.0 else (a @ b).item() / size


def max_abs(found: Tensor, reference: Tensor) -> float:
    """Largest absolute difference."""
    return (found.double() - reference.double()).abs().max().item() if found.numel() else 0.0


def mae(found: Tensor, reference: Tensor) -> float:
    """Mean absolute difference, in the units of the tensors (of 255 for pictures)."""
    return (found.double() - reference.double()).abs().mean().item()


def psnr(found_HWC: Tensor, reference_HWC: Tensor) -> float:
    """Peak signal-to-noise ratio of uint8 pictures in dB; infinite for equal ones."""
    error = (found_HWC.double() - reference_HWC.double()).square().mean().item()
    return math.inf if error == 0.0 else 10.0 * math.log10(255.0**2 / error)


def ssim(found_HWC: Tensor, reference_HWC: Tensor) -> float:
    """Structural similarity of uint8 pictures (Wang et al. 2004), mean over pixels and channels.

    For sides of at least 11 pixels it equals scikit-image's structural_similarity with gaussian_weights=True,
    sigma=1.5, use_sample_covariance=False, data_range=255; for smaller ones the window is cut.
    """
    similarity, _ = _ssim_maps(_channels(found_HWC), _channels(reference_HWC))
    return similarity


def ms_ssim(found_HWC: Tensor, reference_HWC: Tensor) -> float:
    """Multi-scale SSIM (Wang, Simoncelli and Bovik 2003) of uint8 pictures.

    Five scales need sides of 176; smaller pictures use the scales they have room for, with the weights renormalised.
    Negative contrast terms count as zero.
    """
    a, b = _channels(found_HWC), _channels(reference_HWC)
    smallest = 2 * SSIM_RADIUS + 1
    scales = min(len(MS_SSIM_WEIGHTS), max(1, int(math.log2(min(a.shape[-2:]) / smallest)) + 1))
    weights = [w / sum(MS_SSIM_WEIGHTS[:scales]) for w in MS_SSIM_WEIGHTS[:scales]]
    value = 1.0
    for scale, weight in enumerate(weights):
        similarity, contrast = _ssim_maps(a, b)
        value *= max(similarity if scale == scales - 1 else contrast, 0.0) ** weight
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return value


def kl_divergence(found_NV: Tensor, reference_NV: Tensor) -> Tensor:
    """KL(reference || found) of the softmax distributions, in nats, for each of N positions; float64 [N]."""
    log_p = reference_NV.double().log_softmax(-1)
    log_q = found_NV.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0.0)


def top1(found_NV: Tensor, reference_NV: Tensor) -> float:
    """Share of positions whose most likely token is the same."""
    return (found_NV.argmax(-1) == reference_NV.argmax(-1)).double().mean().item()


def perplexity_ratio(found_NV: Tensor, reference_NV: Tensor, targets_N: Tensor) -> float:
    """Perplexity of the target ids under the found logits, divided by that under the reference's."""

    def loss(logits: Tensor) -> float:
        return F.cross_entropy(logits.double(), targets_N).item()

    return math.exp(loss(found_NV) - loss(reference_NV))


def common_prefix(found: Sequence[int], reference: Sequence[int]) -> int:
    """The length of the longest common prefix of two id sequences."""
    for index, (a, b) in enumerate(zip(found, reference, strict=False)):
        if a != b:
            return index
    return min(len(found), len(reference))


def _channels(picture_HWC: Tensor) -> Tensor:
    return picture_HWC.permute(2, 0, 1)[:, None].double()


def _ssim_maps(a_C1HW: Tensor, b_C1HW: Tensor) -> tuple[float, float]:
    """Mean SSIM, and the mean of its contrast-structure part."""
    mean_a, mean_b = _blur(a_C1HW), _blur(b_C1HW)
    var_a = _blur(a_C1HW * a_C1HW) - mean_a * mean_a
    var_b = _blur(b_C1HW * b_C1HW) - mean_b * mean_b
    both = _blur(a_C1HW * b_C1HW) - mean_a * mean_b
    c1, c2 = (SSIM_K1 * 255) ** 2, (SSIM_K2 * 255) ** 2
    contrast = (2 * both + c2) / (var_a + var_b + c2)
    similarity = contrast * (2 * mean_a * mean_b + c1) / (mean_a * mean_a + mean_b * mean_b + c1)
    return similarity.mean().item(), contrast.mean().item()


def _blur(x_C1HW: Tensor) -> Tensor:
    """Convolves with the Gaussian window, without padding; the window is cut where a side is shorter than it."""
    at = torch.arange(-SSIM_RADIUS, SSIM_RADIUS + 1, dtype=torch.float64)
    taps = torch.exp(-at.square() / (2 * SSIM_SIGMA**2))
    for axis in (2, 3):
        width = min(2 * SSIM_RADIUS + 1, x_C1HW.shape[axis])
        start = (2 * SSIM_RADIUS + 1 - width) // 2
        window = taps[start : start + width] / taps[start : start + width].sum()
        x_C1HW = F.conv2d(x_C1HW, window[None, None, :, None] if axis == 2 else window[None, None, None, :])
    return x_C1HW
