import pytest
import torch
from small_unet import CONFIG, random_unet
from torch import Tensor

from ldm.training.whitening import FLOOR, Whitening

WIDTH = CONFIG.cross_attention_dim


@pytest.fixture
def tokens() -> Tensor:
    """[5000,8] about a far mean, with variances from 1e-3 to 10."""
    torch.manual_seed(0)
    spread = torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q * torch.logspace(-1.5, 0.5, WIDTH)
    return 12 * torch.randn(WIDTH) + torch.randn(5000, WIDTH) @ spread.T


def test_tokens_become_of_mean_zero_and_of_the_variance_that_the_floor_leaves(tokens: Tensor) -> None:
    covariance = torch.cov(tokens.double().T, correction=0)
    floor = FLOOR * covariance.trace() / WIDTH * torch.eye(WIDTH)
    whitened = Whitening.of(tokens)(tokens).double()
    assert whitened.mean(0).abs().max() < 1e-5
    # Both commute, having the same eigenvectors, so the root on either side is the inverse on one.
    expected = covariance @ torch.linalg.inv(covariance + floor)
    torch.testing.assert_close(torch.cov(whitened.T, correction=0), expected, rtol=0, atol=1e-4)


def test_tokens_are_whitened_in_float32_under_autocast(tokens: Tensor) -> None:
    whitening = Whitening.of(tokens)
    expected = whitening(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(whitening(tokens), expected)


def test_a_folded_unet_does_with_raw_contexts_what_it_did_with_whitened_ones(tokens: Tensor) -> None:
    unet, whitening = random_unet(), Whitening.of(tokens)
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), tokens[:10].view(2, 5, WIDTH)
    expected = unet(x, t, whitening(context))
    torch.testing.assert_close(whitening.folded(unet)(x, t, context), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(unet(x, t, context), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(
        whitening.unfolded(unet)(x, t, whitening(context)), unet(x, t, context), rtol=1e-4, atol=1e-4
    )
