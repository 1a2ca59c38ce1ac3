"""What the autoencoder and its adversary minimise, against closed forms."""

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from autoencoder.bottleneck import DiagonalGaussian
from autoencoder.discriminator import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from autoencoder.loss import SQUARED, kl_loss, reconstruction_loss


def make_posterior() -> DiagonalGaussian:
    return DiagonalGaussian.from_moments(torch.randn(3, 8, 2, 5, generator=torch.Generator().manual_seed(0)))


def test_kl_equals_torch_distributions() -> None:
    posterior = make_posterior()
    expected = kl_divergence(Normal(posterior.mean, (0.5 * posterior.logvar).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(posterior.kl(), expected.sum((1, 2, 3)))
    torch.testing.assert_close(kl_loss(posterior), expected.mean())


def test_kl_of_the_prior_is_zero() -> None:
    assert DiagonalGaussian(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)).kl().item() == 0


def test_log_variances_are_clamped() -> None:
    moments = torch.cat([torch.zeros(1, 2, 1, 1), torch.tensor([-100.0, 100.0]).reshape(1, 2, 1, 1)], 1)
    assert DiagonalGaussian.from_moments(moments).logvar.flatten().tolist() == [-30, 20]


def test_sample_has_the_posterior_s_mean_and_std() -> None:
    posterior = make_posterior()
    torch.testing.assert_close(posterior.sample(torch.zeros_like(posterior.mean)), posterior.mean)
    std = posterior.sample(torch.ones_like(posterior.mean)) - posterior.mean
    torch.testing.assert_close(std.square().log(), posterior.logvar, atol=1e-4, rtol=1e-4)


def test_reconstruction_loss_by_hand() -> None:
    images, reconstruction = torch.tensor([0.0, 1.0, -0.5, 0.25]), torch.tensor([0.5, 1.0, 0.5, 0.0])
    expected = (0.5 + 1 + 0.25) / 4 + SQUARED * (0.25 + 1 + 0.0625) / 4
    assert reconstruction_loss(images, reconstruction).item() == pytest.approx(expected)


def test_hinge_losses_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.5, 1.0])
    # real: 0, 0.5, 2; fake: 0, 1.5, 2
    assert discriminator_loss(real, fake).item() == pytest.approx(0.5 * (2.5 / 3 + 3.5 / 3))
    assert generator_loss(fake).item() == pytest.approx(0.5 / 3)
    assert generator_loss(fake + 1) < generator_loss(fake)


def test_adaptive_weight_by_hand() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        network[0].weight.copy_(torch.eye(2))
        network[0].bias.zero_()
        network[2].weight.copy_(torch.tensor([[1.0, 2.0]]))
    output = network(torch.tensor([[3.0, 4.0]]))  # 11; its gradient at the last layer is (3, 4), of norm 5
    reconstruction, adversarial = (output - 10).square().sum(), -0.5 * output.mean()

    weight = adaptive_weight(reconstruction, adversarial, network[2].weight)

    assert weight.item() == pytest.approx((2 * 1 * 5) / (0.5 * 5 + 1e-4))
    assert not weight.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())
    assert adaptive_weight(reconstruction, adversarial, network[2].weight, largest=3).item() == 3
    (reconstruction + weight * adversarial).backward()  # both graphs are still there


@pytest.mark.parametrize(("layers", "side"), [(3, 6), (2, 14)])
def test_discriminator_has_a_logit_for_each_patch(layers: int, side: int) -> None:
    assert PatchDiscriminator(8, layers)(torch.zeros(2, 3, 64, 64)).shape == (2, 1, side, side)


@torch.no_grad()
def test_logits_do_not_depend_on_other_pictures_of_the_batch() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(8)
    images = torch.randn(3, 3, 32, 32)
    together = discriminator(images)
    torch.testing.assert_close(discriminator(images[1:2]), together[1:2], atol=1e-6, rtol=1e-5)
    images[0] = 100
    torch.testing.assert_close(discriminator(images)[1:], together[1:], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_logit_sees_only_its_patch() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(8, layers=1)
    # without the norms, which look at the whole picture
    discriminator.layers = nn.Sequential(*(m for m in discriminator.layers if not isinstance(m, nn.GroupNorm)))
    images = torch.randn(1, 3, 64, 64)
    before = discriminator(images)
    images[..., -8:, -8:] = 5
    changed = (discriminator(images) != before)[0, 0]
    assert changed[-1, -1]
    assert not changed[: before.shape[2] // 2].any()
