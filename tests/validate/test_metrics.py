"""Metrics against scikit-image, against torch's own KL, and at their edges."""

import math

import numpy as np
import pytest
import torch

from bagel_compress.build.limits import resolve
from bagel_compress.errors import RecipeError
from bagel_compress.parity import metrics
from bagel_compress.parity.diagnose import Probes, probe_values
from bagel_compress.parity.extremes import largest, middle, smallest
from bagel_compress.parity.report_data import ParityReport, Row
from bagel_compress.report.text import worst_rows


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    rows, cols = np.mgrid[0:200, 0:180]
    smooth = np.stack([np.sin(rows / 9), np.cos(cols / 13), np.sin((rows + cols) / 17)], -1) * 100 + 128
    noisy = smooth + rng.normal(0, 12, smooth.shape)
    return [torch.from_numpy(np.clip(p, 0, 255).astype(np.uint8)) for p in (noisy, smooth)]


def test_psnr_and_ssim_agree_with_scikit_image(pictures):
    skimage = pytest.importorskip("skimage.metrics")
    found, reference = (p.numpy() for p in pictures)
    assert metrics.psnr(*pictures) == pytest.approx(skimage.peak_signal_noise_ratio(reference, found), abs=1e-9)
    theirs = skimage.structural_similarity(
        reference, found, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
    )
    assert metrics.ssim(*pictures) == pytest.approx(theirs, abs=1e-6)


def test_equal_pictures_are_equal_in_every_metric(pictures):
    a = pictures[0]
    assert metrics.psnr(a, a) == math.inf
    assert metrics.ssim(a, a) == pytest.approx(1.0)
    assert metrics.ms_ssim(a, a) == pytest.approx(1.0)
    assert (metrics.mae(a, a), metrics.rel_l2(a, a), metrics.cosine(a, a)) == (0.0, 0.0, 1.0)


def test_ms_ssim_falls_with_noise_and_works_on_small_pictures(pictures):
    found, reference = pictures
    assert 0.3 < metrics.ms_ssim(found, reference) < 0.999
    worse = (found.double() + 30 * torch.randn(found.shape)).clamp(0, 255).to(torch.uint8)
    assert metrics.ms_ssim(worse, reference) < metrics.ms_ssim(found, reference)
    assert 0 < metrics.ms_ssim(found[:16, :24], reference[:16, :24]) < 1


def test_vector_metrics_have_their_textbook_values():
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])
    assert metrics.rel_l2(a, b) == pytest.approx(4 / 3)
    assert metrics.cosine(a, b) == pytest.approx(0.6)
    assert metrics.gain(1.02 * a, a) == pytest.approx(1.02)
    assert metrics.max_abs(a, b) == 4.0
    zero = torch.zeros(2)
    assert (metrics.rel_l2(zero, zero), metrics.rel_l2(a, zero), metrics.cosine(a, zero)) == (0.0, math.inf, 0.0)


def test_logit_metrics():
    torch.manual_seed(0)
    found, reference = torch.randn(50, 300), torch.randn(50, 300)
    expected = torch.nn.functional.kl_div(
        found.double().log_softmax(-1), reference.double().log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert torch.allclose(metrics.kl_divergence(found, reference), expected)
    assert metrics.kl_divergence(reference, reference).max() == 0.0
    assert metrics.top1(reference, reference) == 1.0
    targets = reference.argmax(-1)
    assert metrics.perplexity_ratio(reference, reference, targets) == 1.0
    assert metrics.perplexity_ratio(found, reference, targets) > 10


def test_common_prefix():
    assert metrics.common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert metrics.common_prefix([1, 2], [1, 2, 4]) == 2
    assert metrics.common_prefix([], [1]) == 0


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_nan_is_the_worst_of_a_list_wherever_it_stands(place):
    values = [1.0, 3.0, 2.0]
    assert (largest(values), smallest(values), middle(values)) == (3.0, 1.0, 2.0)
    values.insert(place, math.nan)
    assert all(math.isnan(f(values)) for f in (largest, smallest, middle))


@pytest.mark.parametrize("place", [0, 1])
def test_the_table_shows_a_nan_before_a_broken_value(place):
    rows = [Row(case="a", metric="latent.path", value=9.0, floor=None, limit=0.1, ok=False, source="ours")]
    rows.insert(
        place, Row(case="b", metric="latent.path", value=math.nan, floor=None, limit=0.1, ok=False, source="ours")
    )
    report = ParityReport.model_construct(rows=tuple(rows))
    assert [row.case for row in worst_rows(report)] == ["b"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_limits_are_finite(value):
    with pytest.raises(RecipeError, match="expected a finite number"):
        resolve("8-bit", {"latent.path": value})
    assert not resolve("8-bit", {})["latent.path"].holds(math.nan)
    assert not resolve("8-bit", {})["image.psnr"].holds(math.nan)


def test_a_probe_that_answers_nan_breaks_both_limits():
    reference = {"layers.0.und.q_proj": torch.randn(9, 4, generator=torch.Generator().manual_seed(1))}
    found = {"layers.0.und.q_proj": reference["layers.0.und.q_proj"].clone()}
    found["layers.0.und.q_proj"][0, 0] = math.nan
    assert all(math.isnan(value) for value in probe_values(Probes(found), Probes(reference)).values())
