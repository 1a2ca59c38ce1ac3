"""What the autoencoder minimises: reconstruction, and a whisper of KL or the distance to the codebook.

The adversarial part is in `discriminator.py`.
"""

import torch.nn.functional as F
from torch import Tensor

from autoencoder.bottleneck import DiagonalGaussian, Quantized

SQUARED = 5.0  # errors above 1 / SQUARED weigh more than in proportion: edges and small things are few pixels
CODEBOOK = 0.25  # weight of the term that moves the codes; the paper weighs the other, but published models did this


def reconstruction_loss(images: Tensor, reconstruction: Tensor) -> Tensor:
    """|x - x'| + 5 (x - x')^2, averaged to a scalar: the first keeps edges sharp, the second is what PSNR measures."""
    difference = images - reconstruction
    return (difference.abs() + SQUARED * difference**2).mean()


def kl_loss(posterior: DiagonalGaussian) -> Tensor:
    """KL to N(0, 1) in nats per latent value, averaged. Scalar."""
    return posterior.kl().mean() / posterior.mean[0].numel()


def codebook_loss(quantized: Quantized) -> Tensor:
    """(z - sg[e])^2 + 0.25 (sg[z] - e)^2 for latents z and their codes e, averaged to a scalar.

    Equation 3 of van den Oord et al. 2017, where sg stops the gradient: the first term commits the encoder to its
    codes, the second draws the codes to the latents.
    """
    z, e = quantized.latents.float(), quantized.codes.float()
    return F.mse_loss(z, e.detach()) + CODEBOOK * F.mse_loss(e, z.detach())
