"""Between encoder and decoder: a Gaussian per latent, pulled towards N(0, 1) (Kingma and Welling 2013), or the nearest
of a codebook's vectors (van den Oord et al. 2017).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

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

    @classmethod
    def certain(cls, mean: Tensor) -> "DiagonalGaussian":
        """All of the mass on one value [B,C,h,w], which every sample is."""
        return cls(mean, torch.full_like(mean, -torch.inf))

    def sample(self, eps: Tensor) -> Tensor:
        """mean + std * eps, for unit noise eps [B,C,h,w]."""
        return self.mean + (0.5 * self.logvar).exp() * eps

    def kl(self) -> Tensor:
        """KL(q || N(0, 1)) in nats, summed over each picture's latents: [B]."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).sum((1, 2, 3))


@dataclass(frozen=True)
class Quantized:
    """Latents [B,C,h,w], unscaled, and what the codebook has for them: codes [B,C,h,w] of indices int64 [B,h,w]."""

    latents: Tensor
    codes: Tensor
    indices: Tensor

    def straight_through(self) -> Tensor:
        """The codes; the gradient goes to the latents in their place (van den Oord et al. 2017, section 3.2)."""
        return self.codes.detach() + (self.latents - self.latents.detach())


def perplexity(indices: Tensor) -> Tensor:
    """exp of the entropy of a codebook's indices [B,h,w]: how many codes are in use, as if equally often. Scalar."""
    counts = indices.flatten().bincount()
    out: Tensor = torch.special.entr(counts / counts.sum()).sum().exp()
    return out


class VectorQuantizer(nn.Module):
    """A learned codebook; parameters named as published."""

    def __init__(self, codes: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, channels)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)

    def forward(self, latents: Tensor) -> Quantized:
        """The nearest code (van den Oord et al. 2017, equations 1 and 2) of each of the latents [B,C,h,w]."""
        codebook = self.embedding.weight.detach().float()
        points = latents.detach().float().flatten(2).mT
        # One picture at a time, because a batch's distances to a large codebook are gigabytes.
        nearest = torch.stack([torch.cdist(each, codebook).argmin(1) for each in points])
        indices = nearest.reshape(len(latents), *latents.shape[2:])
        codes = self.embedding(indices).permute(0, 3, 1, 2)
        return Quantized(latents, codes, indices)


def unit_noise(like: Tensor, generator: Generators) -> Tensor:
    """Unit noise of a posterior's shape, drawn in float32 where the generator is: from one, or one for each picture.
    For one picture each of several generators draws, so that there are as many samples of it.

    Raises ValueError if several pictures have another number of generators.
    """

    def draw(one: torch.Generator, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=one, device=one.device).to(like.device, like.dtype)

    if isinstance(generator, torch.Generator):
        return draw(generator, like.shape)
    if len(like) not in (1, len(generator)):
        raise ValueError(f"{len(generator)} generators for {len(like)} images: give one, or one for each")
    return torch.stack([draw(one, like.shape[1:]) for one in generator])
