"""The patch discriminator (Isola et al. 2017, section 3.2.2) that judges local realism, and its hinge losses."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """images [B,3,H,W] in [-1,1] -> one logit per patch [B,1,~H/8,~W/8]; positive means real.

    Group instead of batch normalisation, so that a picture's logits do not depend on its neighbours in the batch or
    on the number of processes.
    """

    def __init__(self, width: int = 64, layers: int = 3, in_channels: int = 3) -> None:
        super().__init__()
        blocks: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        channels = width
        for i in range(1, layers + 1):
            outputs = width * min(2**i, 8)
            stride = 2 if i < layers else 1
            blocks += [
                nn.Conv2d(channels, outputs, 4, stride, 1, bias=False),
                nn.GroupNorm(8, outputs),
                nn.LeakyReLU(0.2),
            ]
            channels = outputs
        blocks.append(nn.Conv2d(channels, 1, 4, 1, 1))
        self.layers = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.layers(images)
        return out


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss (Lim & Ye 2017) of logits for real and for reconstructed pictures; the latter must be detached."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """What the decoder minimises: that its patches be taken for real."""
    return -fake.mean()


def adaptive_weight(
    reconstruction: Tensor,
    adversarial: Tensor,
    last_layer: Tensor,
    largest: float = 1e4,
    over_processes: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> Tensor:
    """||grad of the reconstruction loss|| / ||grad of the adversarial loss|| at the decoder's last layer.

    Esser et al. 2021, equation 7: it balances the two losses whatever their scales. Detached, at most `largest`.
    `over_processes` makes of a process' gradient the mean of all that share a batch, which then have one weight.
    """
    losses = (reconstruction, adversarial)
    gradients = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in losses]
    towards_pixels, towards_realism = [over_processes(gradient).norm() for gradient in gradients]
    out: Tensor = (towards_pixels / (towards_realism + 1e-4)).clamp(0, largest).detach()
    return out
