"""Pixels <-> latents, and the adversary that keeps the pixels sharp."""

from autoencoder.identity import IdentityAutoencoder, IdentityAutoencoderConfig
from autoencoder.model import Autoencoder, AutoencoderConfig
from autoencoder.vq import VQAutoencoder, VQAutoencoderConfig

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "IdentityAutoencoder",
    "IdentityAutoencoderConfig",
    "VQAutoencoder",
    "VQAutoencoderConfig",
]
