"""Figures of pictures and of their feature vectors, each with an interval that says how sure it is; pure functions.

Features are [N,D], a row for each picture. A mean's interval is the 95 % percentile bootstrap of `RESAMPLES` resamples.
A distance of two sets is no mean, and a resample, which holds pictures twice, biases it: its interval is 1.96 standard
deviations over resamples of both sets to either side. It tells how the figure would vary over as many other pictures,
not how far the figure lies above the one of infinitely many.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 2000
SET_RESAMPLES, WIDE, WIDE_RESAMPLES = 100, 1024, 20  # beyond WIDE features a resample of FID takes seconds
KERNEL_MOST = 5000  # pictures of each set that KID takes: its matrices grow with the square
NEIGHBOURS = 3
AT_ONCE = 1000  # rows of a distance matrix
EXACT = 100.0  # dB


@dataclass(frozen=True)
class Measured:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


def mean(values: Sequence[float] | Tensor) -> Measured:
    """The mean over pictures."""
    found = np.asarray(values, dtype=float)
    rng = np.random.default_rng(0)
    draws = [found[rng.integers(len(found), size=len(found))].mean() for _ in range(RESAMPLES)]
    return Measured(float(found.mean()), *(float(v) for v in np.quantile(draws, (0.025, 0.975))))


def frechet(real: Tensor, other: Tensor) -> float:
    """FID, the squared Frechet distance of two Gaussians with the sets' moments (Heusel et al. 2017, eq. 6).

    tr (C1 C2)^1/2 is the sum of the singular values of R1 R2^T with C = R^T R, so no covariance is ever multiplied by
    another or its root drawn, and sets smaller than the features are wide need no remedy.
    """
    (mean1, root1), (mean2, root2) = _moments(real), _moments(other)
    shared = torch.linalg.svdvals(root1 @ root2.T).sum()
    return float((mean1 - mean2).square().sum() + root1.square().sum() + root2.square().sum() - 2 * shared)


def measured_frechet(real: Tensor, other: Tensor, paired: bool = False) -> Measured:
    """`frechet` and its interval, which does not go below 0.

    Args:
        paired: row i of both sets belongs to picture i, as in reconstructions, so they are resampled together.
    """
    resamples = set_resamples(real.shape[1])
    return _of_sets(lambda i, j: frechet(real[i], other[j]), len(real), len(other), paired, resamples, least=0)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean [D], and R [min(N,D),D] with R^T R the unbiased covariance."""
    features = features.double()
    center = features.mean(0)
    return center, torch.linalg.qr((features - center) / (len(features) - 1) ** 0.5, mode="r").R


def set_resamples(width: int) -> int:
    """Resamples of two sets of features that are `width` wide."""
    return SET_RESAMPLES if width <= WIDE else WIDE_RESAMPLES


def kernel_distance(real: Tensor, other: Tensor, paired: bool = False) -> Measured:
    """KID, the unbiased squared MMD under the kernel (x.y / D + 1)^3 (Binkowski et al. 2018, section 4), of at most
    the first `KERNEL_MOST` pictures of each set. No picture is compared with itself, be it that a resample holds it
    twice, or that `paired` sets hold it in two versions, which are not independent.
    """
    from torchmetrics.image.kid import poly_kernel

    real, other = real[:KERNEL_MOST].double(), other[:KERNEL_MOST].double()
    within_real, within_other, between = poly_kernel(real, real), poly_kernel(other, other), poly_kernel(real, other)

    def mean_of_pairs(kernel: Tensor, m: Tensor, n: Tensor, same: bool) -> Tensor:
        """Row i counts m[i] times and column j n[j] times; `same` leaves out the pairs i = j."""
        total, pairs = m @ kernel @ n, m.sum() * n.sum()
        return (total - (m * n) @ kernel.diagonal()) / (pairs - m @ n) if same else total / pairs

    def distance(i: Tensor, j: Tensor) -> float:
        m, n = i.bincount(minlength=len(real)).double(), j.bincount(minlength=len(other)).double()
        within = mean_of_pairs(within_real, m, m, same=True) + mean_of_pairs(within_other, n, n, same=True)
        return float(within - 2 * mean_of_pairs(between, m, n, same=paired))

    return _of_sets(distance, len(real), len(other), paired, SET_RESAMPLES)


def _of_sets(
    distance: Callable[[Tensor, Tensor], float], m: int, n: int, paired: bool, resamples: int, least: float = -math.inf
) -> Measured:
    """`distance` takes the rows of the one set and of the other that count, as often as they are named, and is never
    below `least`.
    """
    value = distance(torch.arange(m), torch.arange(n))
    rng = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(resamples):
        i = torch.randint(m, (m,), generator=rng)
        draws.append(distance(i, i if paired else torch.randint(n, (n,), generator=rng)))
    spread = 1.96 * float(np.nanstd(draws, ddof=1))  # a resample of one picture alone has no pairs
    return Measured(value, max(value - spread, least), value + spread)


def precision_and_recall(real: Tensor, other: Tensor) -> dict[str, Measured]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eqs. 1 and 2), k = 3, of equally many of each set.

    Precision is the share of `other` inside the manifold of `real`, recall the share of `real` inside that of `other`.
    Their intervals are over the pictures that are asked, the manifold held fixed.
    """
    count = min(len(real), len(other))
    real, other = real[:count], other[:count]
    return {"precision": mean(inside(other, real).double()), "recall": mean(inside(real, other).double())}


def inside(points: Tensor, manifold: Tensor) -> Tensor:
    """Which points lie, for some point of the manifold, no farther from it than its k-th nearest other: bool [N].

    f(phi, Phi) of Kynkaanniemi et al. 2019, eq. 1. Raises ValueError for a manifold of no more than k points.
    """
    if len(manifold) <= NEIGHBOURS:
        raise ValueError(f"{len(manifold)} pictures have no {NEIGHBOURS} neighbours each: give at least 4")
    points, manifold = points.double(), manifold.double()
    radii = torch.cat(
        [torch.cdist(some, manifold).kthvalue(NEIGHBOURS + 1).values for some in manifold.split(AT_ONCE)]
    )  # the nearest of all is the point itself
    return torch.cat([(torch.cdist(some, manifold) <= radii).any(1) for some in points.split(AT_ONCE)])


def nearest(points: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Distance [N] and row [N] of each point's nearest neighbour among others."""
    found = [torch.cdist(some, among.double()).min(1) for some in points.double().split(AT_ONCE)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def explained(features: Tensor, groups: Sequence[str]) -> float:
    """The share of the features' variance that lies between groups of rows and not within them.

    Epsilon squared (Kelley 1935): with the unbiased variances, so that many groups of few rows explain nothing.

    Raises ValueError if no feature varies.
    """
    features, (names, group) = features.double(), np.unique(groups, return_inverse=True)
    member = torch.nn.functional.one_hot(torch.from_numpy(group), len(names)).double()
    centers = (member.T @ features) / member.sum(0)[:, None]
    total = (features - features.mean(0)).square().sum()
    if total == 0:
        raise ValueError(f"all {len(features)} pictures have the same features")
    within = (features - member @ centers).square().sum() / max(len(features) - len(names), 1)
    return 1 - float(within / (total / (len(features) - 1)))


def inception_score(logits: Tensor) -> float:
    """exp E KL(p(y|x) || p(y)) (Salimans et al. 2016, section 4) of logits [N,K], in one split: 1 at least, K at most.

    An inception-style score only, unless the logits are Inception's.
    """
    log_p = logits.double().log_softmax(1)
    marginal = log_p.logsumexp(0) - np.log(len(log_p))
    return float((log_p.exp() * (log_p - marginal)).sum(1).mean().exp())


def measured_inception_score(logits: Tensor) -> Measured:
    """`inception_score` and its interval, which does not go below 1."""
    return _of_sets(lambda i, _: inception_score(logits[i]), len(logits), 1, False, SET_RESAMPLES, least=1)


def clip_scores(images: Tensor, texts: Tensor) -> Tensor:
    """100 max(cos, 0) of each picture's embedding and its caption's, both [N,D] (Hessel et al. 2021, eq. 1): [N].

    The weight is 100, as in torchmetrics, where the paper has 2.5.
    """
    return 100 * torch.cosine_similarity(images.double(), texts.double()).clamp(min=0)


def psnr(images: Tensor, other: Tensor) -> Tensor:
    """PSNR in dB of each pair of pictures [N,3,H,W] in [-1,1]: [N]; 100 stands for pictures without any difference."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    found = peak_signal_noise_ratio(other, images, data_range=2.0, reduction="none", dim=(1, 2, 3))
    return found.clamp(max=EXACT)


def ssim(images: Tensor, other: Tensor) -> Tensor:
    """SSIM (Wang et al. 2004, eq. 13) of each pair of pictures [N,3,H,W] in [-1,1], Gaussian window of 11 px: [N].

    Its luminance term compares means as shares of their size, so it has to be told where black is: at 0.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    from_black = (other + 1) / 2, (images + 1) / 2
    found: Tensor = structural_similarity_index_measure(*from_black, data_range=1.0, reduction="none")
    return found.reshape(len(images))
