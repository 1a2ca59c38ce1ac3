"""What the autoencoder minimises: reconstruction and a whisper of KL; the adversarial part is in `discriminator.py`."""

from torch import Tensor

from autoencoder.bottleneck import DiagonalGaussian


def reconstruction_loss(images: Tensor, reconstruction: Tensor) -> Tensor:
    """|x - x'| + (x - x')^2 per value, averaged: the first keeps edges, the second what PSNR measures. Scalar."""
    difference = images - reconstruction
    return (difference.abs() + difference**2).mean()


def kl_loss(posterior: DiagonalGaussian) -> Tensor:
    """KL to N(0, 1) in nats per latent value, averaged. Scalar."""
    return posterior.kl().mean() / posterior.mean[0].numel()
