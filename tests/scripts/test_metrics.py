"""Distances of sets of features and figures of pictures, against closed forms and torchmetrics."""

import math

import numpy as np
import pytest
import torch
from evaluation import metrics
from torch import Tensor


def exactly(mean: Tensor, covariance: Tensor, count: int, seed: int) -> Tensor:
    """`count` points whose mean and unbiased covariance are exactly these."""
    points = torch.randn(count, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    points -= points.mean(0)
    white = torch.linalg.cholesky(points.T @ points / (count - 1)).inverse()
    return points @ white.T @ torch.linalg.cholesky(covariance).T + mean


def spd(width: int, seed: int) -> Tensor:
    root = torch.randn(width, 2 * width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return root @ root.T / width


def draws(count: int, seed: int, width: int = 6, shift: float = 0.0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


def test_mean_and_its_interval() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    found = metrics.mean(values.tolist())
    assert found.value == pytest.approx(values.mean())
    assert (found.low + found.high) / 2 == pytest.approx(values.mean(), abs=0.03)
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert metrics.mean([1.0] * 10) == metrics.Measured(1, 1, 1)


def test_a_bootstrap_interval_covers_the_truth_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "RESAMPLES", 300)
    samples = np.random.default_rng(2).normal(0, 1, (200, 60))
    found = [metrics.mean(sample) for sample in samples]
    assert 0.9 <= np.mean([each.low <= 0 <= each.high for each in found]) <= 0.98


def test_frechet_distance_of_two_given_gaussians() -> None:
    """For covariances that commute it is |m1 - m2|^2 + sum (sqrt a - sqrt b)^2."""
    basis = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    a, b = torch.tensor([4.0, 1, 0.5, 9, 2]).double(), torch.tensor([1.0, 1, 2, 4, 0.25]).double()
    m1, m2 = torch.arange(5).double(), torch.tensor([1.0, 1, 0, 3, 6]).double()
    real = exactly(m1, basis @ a.diag() @ basis.T, 30, seed=1)
    other = exactly(m2, basis @ b.diag() @ basis.T, 50, seed=2)
    wanted = (m1 - m2).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert metrics.frechet(real, other) == pytest.approx(wanted.item(), rel=1e-9)
    assert metrics.measured_frechet(real, real, paired=True).value == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("count", [40, 9])  # more and fewer than the features are wide
def test_frechet_distance_against_torchmetrics(count: int) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Features(torch.nn.Identity):
        num_features = 12

    real, other = draws(count, 0, 12) @ spd(12, 0).float(), draws(count + 3, 1, 12, 0.3)
    oracle = FrechetInceptionDistance(feature=Features()).set_dtype(torch.float64)
    oracle.update(real.double(), real=True)
    oracle.update(other.double(), real=False)
    assert metrics.frechet(real, other) == pytest.approx(float(oracle.compute()), rel=1e-4)


def test_intervals_of_a_distance_narrow_with_more_pictures_and_hold_the_figure() -> None:
    few, many = (metrics.measured_frechet(draws(count, 3), draws(count, 4, shift=1)) for count in (50, 800))
    assert few.low < few.value < few.high
    assert many.high - many.low == pytest.approx((few.high - few.low) / 4, rel=0.35)


def test_an_interval_of_a_distance_has_the_spread_of_fresh_draws() -> None:
    fresh = [metrics.kernel_distance(draws(60, 2 * i), draws(60, 2 * i + 1, shift=0.5)).value for i in range(60)]
    one = metrics.kernel_distance(draws(60, 900), draws(60, 901, shift=0.5))
    assert (one.high - one.low) / (2 * 1.96) == pytest.approx(np.std(fresh), rel=0.35)


def test_intervals_stay_where_the_figure_can_be() -> None:
    assert metrics.measured_frechet(draws(8, 12), draws(8, 13)).low >= 0
    assert metrics.measured_inception_score(0.1 * draws(8, 14)).low >= 1
    assert metrics.kernel_distance(draws(8, 12), draws(8, 13)).low < 0


def test_reconstructions_are_resampled_with_their_originals() -> None:
    real = draws(80, 5)
    close = real + 0.01 * draws(80, 6)
    together, apart = (metrics.measured_frechet(real, close, paired=paired) for paired in (True, False))
    assert together.value == apart.value
    assert together.high - together.low < (apart.high - apart.low) / 5


def test_kernel_distance_against_torchmetrics_and_without_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchmetrics.image.kid import poly_mmd

    monkeypatch.setattr(metrics, "SET_RESAMPLES", 2)

    real, other = draws(30, 7).double(), draws(30, 8, shift=1).double()
    assert metrics.kernel_distance(real, other).value == pytest.approx(float(poly_mmd(real, other)), rel=1e-9)
    assert metrics.kernel_distance(real, real, paired=True) == metrics.Measured(0, 0, 0)
    same_law = [metrics.kernel_distance(draws(20, 2 * i), draws(30, 2 * i + 1)).value for i in range(150)]
    assert abs(np.mean(same_law)) < 3 * np.std(same_law) / math.sqrt(150)


def test_precision_and_recall() -> None:
    real = draws(50, 9)
    same = metrics.precision_and_recall(real, real)
    assert same["precision"].value == same["recall"].value == 1
    far = metrics.precision_and_recall(real, real + 100)
    assert far["precision"].value == far["recall"].value == 0
    # a model that draws one picture well: all is precise, little is recalled
    collapsed = metrics.precision_and_recall(real, real[:1] + 1e-3 * draws(50, 10))
    assert collapsed["precision"].value == 1
    assert collapsed["recall"].value < 0.1


def test_a_manifold_is_all_balls_to_the_third_neighbour() -> None:
    line = torch.tensor([[0.0], [1], [2], [3], [10]])  # third neighbours at distance 3, 2, 2, 3, 9
    points = torch.tensor([[-3.1], [-3.0], [0.9], [18.9], [19.1]])
    assert metrics.inside(points, line).tolist() == [False, True, True, True, False]
    with pytest.raises(ValueError, match="3 pictures have no 3 neighbours"):
        metrics.inside(points, line[:3])


def test_variance_between_groups() -> None:
    """Groups about 0 and 6 with a variance of 1 within: 9 of 10 parts lie between them, but for the small number."""
    groups = ["left"] * 50 + ["right"] * 50
    features = torch.tensor([-1.0, 1]).repeat(50)[:, None] + torch.tensor([0.0, 6]).repeat_interleave(50)[:, None]
    assert metrics.explained(features, groups) == pytest.approx(1 - (100 / 98) / (1000 / 99))
    chance = metrics.explained(draws(64, 15, 40), [str(i // 4) for i in range(64)])
    assert abs(chance) < 0.05
    assert metrics.explained(features, ["all"] * 100) == pytest.approx(0)
    with pytest.raises(ValueError, match="all 100 pictures have the same features"):
        metrics.explained(torch.ones(100, 2), groups)


def test_nearest() -> None:
    distance, row = metrics.nearest(torch.tensor([[0.0, 0], [3, 4]]), torch.tensor([[3.0, 0], [0, 1]]))
    assert row.tolist() == [1, 0]
    assert distance.tolist() == [1, 4]


def test_inception_score_of_certain_and_of_clueless_classes() -> None:
    certain = 1000 * torch.eye(7).repeat(5, 1)
    assert metrics.inception_score(certain) == pytest.approx(7)
    assert metrics.inception_score(torch.zeros(20, 7)) == pytest.approx(1)


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore`")
def test_inception_score_against_torchmetrics() -> None:
    from torchmetrics.image.inception import InceptionScore

    logits = 2 * draws(60, 11)
    oracle = InceptionScore(feature=torch.nn.Identity(), splits=1)
    oracle.update(logits)
    with pytest.warns(UserWarning, match="degrees of freedom"):  # it wants the deviation of one split
        wanted = float(oracle.compute()[0])
    found = metrics.measured_inception_score(logits)
    assert found.value == pytest.approx(wanted, rel=1e-5)
    assert found.low < found.value < found.high


def test_clip_score_is_a_cosine() -> None:
    images = torch.tensor([[1.0, 0], [1, 1], [-1, 0]])
    texts = torch.tensor([[2.0, 0], [1, 0], [1, 0]])
    assert metrics.clip_scores(images, texts).tolist() == pytest.approx([100, 100 / math.sqrt(2), 0])


def test_psnr_and_ssim_of_each_picture() -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.5
    other = images + torch.tensor([0.2, 0.02])[:, None, None, None]
    assert metrics.psnr(images, other).tolist() == pytest.approx([20, 40], abs=1e-3)  # 20 log10(2 / error)
    assert metrics.psnr(images, images).tolist() == [100, 100]
    lost, kept = metrics.ssim(images, other).tolist()
    assert lost < kept < 1
    assert metrics.ssim(images, images).tolist() == pytest.approx([1, 1])


def test_ssim_of_flat_pictures_is_its_luminance_term() -> None:
    """Counted from black, so that two greys that hardly differ are alike whatever their brightness."""
    a, b = 0.8, 0.4
    flat = [torch.full((1, 3, 16, 16), 2 * value - 1) for value in (a, b)]
    c1 = 0.01**2
    assert metrics.ssim(*flat).item() == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-4)
    greys = [torch.full((1, 3, 16, 16), value) for value in (0.02, -0.02)]
    assert metrics.ssim(*greys).item() > 0.999
