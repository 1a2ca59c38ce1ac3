"""An autoencoder for larger or smaller pictures of the same latents, with levels more or fewer than a trained one.

Levels are added or left out where the pixels are; those near the latents are the trained one's.
"""

import re

import torch
from torch import Tensor, nn

from autoencoder.model import Autoencoder, CoderConfig, Downsample, Level, ResidualBlock, Upsample
from autoencoder.vq import VQAutoencoder

BY_LEVEL = ("block_out_channels", "down_block_types", "up_block_types")
"""Fields of a config with one entry per level, the encoder's: from the pixels to the latents."""


def levels_more(config: CoderConfig, than: CoderConfig) -> int:
    """How many levels more `config` has."""
    return len(config.block_out_channels) - len(than.block_out_channels)


def inner(config: CoderConfig, name: str, levels: int) -> object:
    """What a field says of so many levels near the latents, or of all that there are; of other fields all."""
    value = getattr(config, name)
    if name not in BY_LEVEL:
        return value
    return value[:levels] if name == "up_block_types" else value[-levels:]


@torch.no_grad()
def start_as(autoencoder: Autoencoder | VQAutoencoder, trained: Autoencoder | VQAutoencoder) -> None:
    """Gives a new autoencoder the weights of one that agrees with it in all but the levels next to the pixels.

    A level that is new halves the features by averaging them and doubles them by repeating them, and its residual
    blocks start as the identity (if its channels are those of its neighbour): so at first it is nearly the trained
    one on pictures of half the size, and its pictures at twice the size.
    """
    more = levels_more(autoencoder.config, trained.config)
    weights = autoencoder.state_dict()
    for theirs, weight in trained.state_dict().items():
        ours = re.sub(r"(?<=encoder\.down_blocks\.)\d+", lambda found: str(int(found[0]) + more), theirs)
        if ours in weights and weights[ours].shape == weight.shape:
            weights[ours] = weight
    autoencoder.load_state_dict(weights)
    if more > 0:
        last = len(trained.decoder.up_blocks) - 1  # which had no step to a next one
        for level in (*autoencoder.encoder.down_blocks[:more], *autoencoder.decoder.up_blocks[last:]):
            assert isinstance(level, Level)
            _pass_on(level, blocks=level is not autoencoder.decoder.up_blocks[last])


def _pass_on(level: Level, blocks: bool) -> None:
    """Make the level's steps, and if `blocks` its residual blocks, pass on what comes in."""
    for part in level.modules():
        if isinstance(part, ResidualBlock) and blocks:
            _zero(part.conv2)
        elif isinstance(part, Downsample):
            _each_channel_alone(part.conv, torch.tensor([[0.25, 0.25, 0], [0.25, 0.25, 0], [0, 0, 0]]))
        elif isinstance(part, Upsample):
            _each_channel_alone(part.conv, torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 0]]))


def _each_channel_alone(conv: nn.Conv2d, kernel: Tensor) -> None:
    _zero(conv)
    conv.weight.diagonal().copy_(kernel[..., None].expand(*kernel.shape, len(conv.weight)))


def _zero(conv: nn.Conv2d) -> None:
    conv.weight.zero_()
    assert conv.bias is not None
    conv.bias.zero_()
