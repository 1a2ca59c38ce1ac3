"""Pixels <-> latents, and the adversary that keeps the pixels sharp."""

from autoencoder.model import Autoencoder, AutoencoderConfig

__all__ = ["Autoencoder", "AutoencoderConfig"]
