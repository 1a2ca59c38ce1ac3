"""No autoencoder at all: the latents are the pixels, for diffusion models of plain images (Ho et al. 2020)."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field
from torch import Tensor, nn

from autoencoder.bottleneck import Generators


class IdentityAutoencoderConfig(BaseModel, frozen=True):
    """The pixels' channels; the other fields are what `AutoencoderConfig` has for everybody to read."""

    latent_channels: int = Field(3, ge=1)
    scaling_factor: float = Field(1.0, ge=1, le=1)


class IdentityAutoencoder(nn.Module):
    """Takes the place of an `Autoencoder`; it has no weights."""

    downsampling_factor = 1

    def __init__(self, config: IdentityAutoencoderConfig) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def from_diffusers_config(cls, config: Mapping[str, Any]) -> "IdentityAutoencoder":
        """Build from the contents of a `vae/config.json`. Raises `pydantic.ValidationError`, a `ValueError`."""
        return cls(IdentityAutoencoderConfig.model_validate(config))

    def encode(self, images: Tensor, generator: Generators | None = None) -> Tensor:
        """The images [B,C,H,W] themselves; there is nothing to draw with a generator."""
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """The images [B,C,H,W] that the latents are; not clamped to [-1,1]."""
        return latents
