"""No autoencoder at all."""

import pytest
import torch

from autoencoder import IdentityAutoencoder


def test_latents_are_the_pixels() -> None:
    autoencoder = IdentityAutoencoder.from_diffusers_config({"latent_channels": 1})
    images = torch.rand(2, 1, 4, 4)
    assert torch.equal(autoencoder.encode(images), images)
    assert torch.equal(autoencoder.decode(images), images)
    assert autoencoder.downsampling_factor == 1


@pytest.mark.parametrize("change", [{"scaling_factor": 0.5}, {"latent_channels": 0}])
def test_unsupported_config(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        IdentityAutoencoder.from_diffusers_config(change)
