"""An autoencoder that starts as another with fewer levels or more: what it then makes of pictures, layer by layer."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder import Autoencoder, AutoencoderConfig, VQAutoencoder, VQAutoencoderConfig
from autoencoder.growth import inner, levels_more, start_as


def make(widths: list[int], seed: int, quantized: bool = False) -> Autoencoder | VQAutoencoder:
    """With weights that are all other than at the start of a training."""
    torch.manual_seed(seed)
    levels = len(widths)
    config: dict[str, Any] = {
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * (levels - 1) + ["AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * (levels - 1),
        "norm_num_groups": 4,
        "layers_per_block": 2,
        "latent_channels": 4,
    }
    codes = {"num_vq_embeddings": 9, "scaling_factor": 1.0}
    made: Autoencoder | VQAutoencoder = (
        VQAutoencoder(VQAutoencoderConfig(**config, **codes)) if quantized else Autoencoder(AutoencoderConfig(**config))
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def seen_by(layer: nn.Module, network: nn.Module, x: Tensor) -> Tensor:
    """What goes into a layer of a network that is given x."""
    inputs: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0].clone()))
    with torch.no_grad():
        network(x)
    handle.remove()
    return inputs[0]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("more", [1, 2])
def test_new_levels_halve_and_double_and_change_nothing_else(more: int, quantized: bool) -> None:
    trained, grown = make([8, 16], 0, quantized), make([8] * more + [8, 16], 1, quantized)
    start_as(grown, trained)
    factor = 2**more

    latents = torch.randn(2, 4, 3, 5)
    before = seen_by(trained.decoder.conv_norm_out, trained.decoder, latents)
    doubled = F.interpolate(before, scale_factor=factor)
    torch.testing.assert_close(seen_by(grown.decoder.conv_norm_out, grown.decoder, latents), doubled)
    assert torch.equal(grown.decoder.conv_out.weight, trained.decoder.conv_out.weight)

    images = torch.randn(2, 3, 8 * factor, 12 * factor)
    with torch.no_grad():
        encoded = grown.encoder(images)
        halved = F.avg_pool2d(trained.encoder.conv_in(images), factor)
        trained.encoder.conv_in = nn.Identity()
        torch.testing.assert_close(encoded, trained.encoder(halved))
    for name in ("quant_conv", "post_quant_conv"):
        assert torch.equal(getattr(grown, name).weight, getattr(trained, name).weight)
    if isinstance(grown, VQAutoencoder) and isinstance(trained, VQAutoencoder):
        assert torch.equal(grown.quantize.embedding.weight, trained.quantize.embedding.weight)


def test_levels_left_out_are_those_next_to_the_pixels() -> None:
    trained, less = make([8, 8, 16], 0), make([8, 16], 1)
    start_as(less, trained)
    features = torch.randn(2, 8, 8, 12)
    level, step = trained.encoder.down_blocks[0], trained.encoder.down_blocks[0].downsamplers[0]
    with torch.no_grad():
        less.encoder.conv_in = nn.Identity()
        trained.encoder.conv_in = nn.Identity()
        for passes in (level.resnets[0], level.resnets[1]):
            passes.conv2.weight.zero_()
            passes.conv2.bias.zero_()
        step.conv.weight.zero_()
        step.conv.bias.zero_()
        step.conv.weight[:, :, 0, 0] = torch.eye(8)
        doubled = F.interpolate(features, scale_factor=2)  # of which the level now takes every second
        torch.testing.assert_close(less.encoder(features), trained.encoder(doubled))
    latents = torch.randn(2, 4, 3, 5)
    before = seen_by(trained.decoder.up_blocks[1].upsamplers[0], trained.decoder, latents)
    assert torch.equal(seen_by(less.decoder.conv_norm_out, less.decoder, latents), before)


def test_a_new_level_may_be_of_another_width() -> None:
    trained, grown = make([8, 16], 0), make([4, 8, 16], 1)
    new = {name: grown.state_dict()[name].clone() for name in ("encoder.conv_in.weight", "decoder.conv_out.weight")}
    start_as(grown, trained)
    for name, weight in new.items():  # there is nothing in the trained one to start as
        assert torch.equal(grown.state_dict()[name], weight)
    blocks = "encoder.down_blocks.{}.resnets.1.conv1.weight"
    assert torch.equal(grown.state_dict()[blocks.format(2)], trained.state_dict()[blocks.format(1)])
    assert grown(torch.randn(1, 3, 16, 16), torch.zeros(1, 4, 4, 4))[0].shape == (1, 3, 16, 16)


def test_of_as_many_levels_it_is_the_same() -> None:
    trained, other = make([8, 16], 0), make([8, 16], 1)
    start_as(other, trained)
    assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in trained.state_dict().items())


def test_levels_are_counted_from_the_latents() -> None:
    small, large = make([8, 16], 0).config, make([4, 8, 16], 0).config
    assert (levels_more(large, small), levels_more(small, large)) == (1, -1)
    for name in ("block_out_channels", "down_block_types", "up_block_types"):
        assert inner(large, name, 2) == inner(small, name, 2) == getattr(small, name)
