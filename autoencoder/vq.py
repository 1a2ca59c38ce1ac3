"""The VQ autoencoder of latent diffusion (Rombach et al. 2022, appendix G.1), parameters named as published.

images [B,3,H,W] in [-1,1] -> latents [B,C,H/f,W/f] -> images, f = 2 ** (levels - 1). The latents are those before the
codebook, and to look up their nearest codes is the decoder's first step: so a diffusion model works on plain numbers.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from autoencoder.bottleneck import DiagonalGaussian, Generators, Quantized, VectorQuantizer
from autoencoder.model import CoderConfig, Count, Decoder, Encoder, fold_in


class VQAutoencoderConfig(CoderConfig, frozen=True):
    """The fields of diffusers' `VQModel` config; what is not supported must keep its neutral value."""

    latent_channels: Count = 3
    num_vq_embeddings: int = Field(256, ge=1, le=2**20)
    vq_embed_dim: int | None = None
    norm_type: Literal["group"] = "group"
    lookup_from_codebook: Literal[False] = False  # for models of indices, whose decoder is given no latents
    force_upcast: bool = False

    @model_validator(mode="after")
    def _codes_are_as_wide_as_latents(self) -> "VQAutoencoderConfig":
        if self.vq_embed_dim not in (None, self.latent_channels):
            raise ValueError(
                f"vq_embed_dim {self.vq_embed_dim} must be latent_channels {self.latent_channels}, or null"
            )
        return self


class VQAutoencoder(nn.Module):
    """Pixels <-> latents. `scaling_factor` of the config is applied inside `encode` and `decode` and nowhere else."""

    def __init__(self, config: VQAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config, channels)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(channels, channels, 1)
        self.quantize = VectorQuantizer(config.num_vq_embeddings, channels)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    @classmethod
    def from_diffusers_config(cls, config: Mapping[str, Any]) -> "VQAutoencoder":
        """Build from the contents of a `vae/config.json`.

        Raises `pydantic.ValidationError`, a `ValueError` that names each key whose value is not supported.
        """
        return cls(VQAutoencoderConfig.model_validate(config))

    @property
    def downsampling_factor(self) -> int:
        """Pixels per latent, along height and width."""
        return self.config.downsampling_factor

    def posterior(self, images: Tensor) -> DiagonalGaussian:
        """q(z|x) of images [B,3,H,W] in [-1,1], before scaling: certainty, for this encoder draws nothing."""
        return DiagonalGaussian.certain(self.quant_conv(self.encoder(images)))

    def encode(self, images: Tensor, generator: Generators | None = None) -> Tensor:
        """Latents [B,C,h,w], scaled, not yet quantized; there is nothing to draw with a generator."""
        return self.posterior(images).mean * self.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B,3,H,W] of the codes nearest to scaled latents [B,C,h,w]; not clamped to [-1,1]."""
        quantized: Quantized = self.quantize(latents / self.config.scaling_factor)
        return self._decode(quantized)

    def forward(self, images: Tensor, eps: Tensor) -> tuple[Tensor, Quantized]:
        """For training: the reconstruction through the codebook, and what was quantized; eps plays no part."""
        quantized: Quantized = self.quantize(self.posterior(images).mean)
        return self._decode(quantized), quantized

    def _decode(self, quantized: Quantized) -> Tensor:
        out: Tensor = self.decoder(self.post_quant_conv(quantized.straight_through()))
        return out

    @torch.no_grad()
    def whiten(self, mean: Tensor, std: Tensor) -> None:
        """Make latents with this mean and std, [C] each, have mean 0 per channel and variance 1 averaged over channels.

        One scale for all channels, so that the nearest code stays the nearest and the pictures do not change. It is
        folded exactly into `quant_conv`, the codebook and `post_quant_conv`.
        """
        std = std.square().mean().sqrt().expand_as(mean)
        fold_in(mean, std, self.quant_conv, self.post_quant_conv)
        self.quantize.embedding.weight.sub_(mean).div_(std)
