"""What the autoencoder minimises: reconstruction and a whisper of KL; the adversarial part is in `discriminator.py`."""

from torch import Tensor

from autoencoder.bottleneck import DiagonalGaussian

SQUARED = 5.0  # errors above 1 / SQUARED weigh more than in proportion: edges and small things are few pixels


def reconstruction_loss(images: Tensor, reconstruction: Tensor) -> Tensor:
    """|x - x'| + 5 (x - x')^2, averaged to a scalar: the first keeps edges sharp, the second is what PSNR measures."""
    difference = images - reconstruction
    return (difference.abs() + SQUARED * difference**2).mean()


def kl_loss(posterior: DiagonalGaussian) -> Tensor:
    """KL to N(0, 1) in nats per latent value, averaged. Scalar."""
    return posterior.kl().mean() / posterior.mean[0].numel()
