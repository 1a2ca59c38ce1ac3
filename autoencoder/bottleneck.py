"""Between encoder and decoder: a diagonal Gaussian per latent, pulled towards N(0, 1) (Kingma and Welling 2013)."""

from dataclasses import dataclass

import torch
from torch import Tensor

Generators = torch.Generator | list[torch.Generator]


@dataclass(frozen=True)
class DiagonalGaussian:
    """A posterior q(z|x). mean and logvar are [B,C,h,w]; logvar is clamped to [-30, 20] by `from_moments`."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> "DiagonalGaussian":
        """moments [B,2C,h,w], as the encoder gives them: means, then log-variances."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    def sample(self, eps: Tensor) -> Tensor:
        """mean + std * eps, for unit noise eps [B,C,h,w]."""
        return self.mean + (0.5 * self.logvar).exp() * eps

    def kl(self) -> Tensor:
        """KL(q || N(0, 1)) in nats, summed over each picture's latents: [B]."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).sum((1, 2, 3))


def unit_noise(like: Tensor, generator: Generators) -> Tensor:
    """Unit noise of a posterior's shape, drawn in float32 on the CPU, from one generator or one for each picture.

    Raises ValueError if there are not as many generators as pictures.
    """
    if isinstance(generator, torch.Generator):
        noise = torch.randn(like.shape, generator=generator)
    elif len(generator) == len(like):
        noise = torch.stack([torch.randn(like.shape[1:], generator=g) for g in generator])
    else:
        raise ValueError(f"{len(generator)} generators for {len(like)} images: give one, or one for each")
    return noise.to(like.device, like.dtype)
