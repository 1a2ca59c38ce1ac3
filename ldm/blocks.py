"""The blocks of the U-Net: one class for each `block_type`, and the levels that are built of them.

A block is x [B,C,h,w], emb [B,E] -> [B,C',h,w]; `emb` is the activated embedding of the time and, in a network with
classes, of the class. Its last layer starts at zero: where C' = C, a new block is the identity.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.layers import Conv3x3, Downsample, GroupNorm, Upsample, made_again, silu, zeroed
from ldm.transformer import Context, SpatialTransformer

BlockType = Literal["residual", "convnext", "channel_attention"]


def adaptive_norm(norm: Callable[[Tensor], Tensor], x: Tensor, modulation: Tensor) -> Tensor:
    """Normalise x [B,C,h,w] under a modulation projected from the embedding.

    [B,C] is a shift of x before the norm (Ho et al. 2020, released code). [B,2C] is scale and shift after it: AdaGN,
    norm(x) (1 + scale) + shift (Dhariwal and Nichol 2021, arXiv 2105.05233, section 3.1).
    """
    modulation = modulation[:, :, None, None]
    if modulation.shape[1] == x.shape[1]:
        return norm(x + modulation)
    scale, shift = modulation.chunk(2, dim=1)
    return norm(x) * (1 + scale) + shift


class ResidualBlock(nn.Module):
    """Two convolutions with the embedding between them (Ho et al. 2020), as published U-Nets have them."""

    def __init__(
        self, in_channels: int, out_channels: int, features: int, groups: int, eps: float, *, scale_shift: bool
    ) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.time_emb_proj = nn.Linear(features, 2 * out_channels if scale_shift else out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.conv2 = zeroed(Conv3x3(out_channels, out_channels))
        self.conv_shortcut = shortcut(in_channels, out_channels)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        out = self.branch(x, emb)
        out += self.conv_shortcut(x)
        return out

    def branch(self, x: Tensor, emb: Tensor) -> Tensor:
        """What the block adds to x."""
        h = self.conv1(made_again(self._activate, x))  # x is kept anyway; what is made of it, in the convolution alone
        h = silu(adaptive_norm(self.norm2, h, self.time_emb_proj(emb)))  # gives up what went in before the convolution
        out: Tensor = self.conv2(h)
        return out

    def _activate(self, x: Tensor) -> Tensor:
        return silu(self.norm1(x))


class ChannelAttentionBlock(ResidualBlock):
    """A residual block whose branch ends in efficient channel attention."""

    def __init__(
        self, in_channels: int, out_channels: int, features: int, groups: int, eps: float, *, scale_shift: bool
    ) -> None:
        super().__init__(in_channels, out_channels, features, groups, eps, scale_shift=scale_shift)
        self.channel_attention = ChannelAttention(out_channels)

    def branch(self, x: Tensor, emb: Tensor) -> Tensor:
        out: Tensor = self.channel_attention(super().branch(x, emb))
        return out


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7 convolution, layer norm, perceptron on each position (Liu et al. 2022, arXiv 2201.03545, figure 4).

    The embedding comes in at the norm. The zero at which the perceptron starts stands for the paper's layer scale.
    `groups` has no part in it: the layer norm is over all channels.
    """

    def __init__(
        self, in_channels: int, out_channels: int, features: int, groups: int, eps: float, *, scale_shift: bool
    ) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(in_channels, in_channels, 7, padding=3, groups=in_channels)
        self.time_emb_proj = nn.Linear(features, 2 * in_channels if scale_shift else in_channels)
        self.norm = ChannelNorm(in_channels, eps)
        self.pwconv1 = nn.Linear(in_channels, 4 * out_channels)
        self.pwconv2 = zeroed(nn.Linear(4 * out_channels, out_channels))
        self.conv_shortcut = shortcut(in_channels, out_channels)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = adaptive_norm(self.norm, self.dwconv(x), self.time_emb_proj(emb))
        # In channels_last memory the positions' channels are a view of the feature map, and so is the way back.
        h = self.pwconv2(F.gelu(self.pwconv1(h.permute(0, 2, 3, 1))))
        out: Tensor = h.permute(0, 3, 1, 2) + self.conv_shortcut(x)
        return out


class ChannelAttention(nn.Module):
    """Gate each channel of x [B,C,h,w] by the means of the k channels around it (Wang et al. 2020, arXiv 1910.03151).

    Efficient channel attention, section 3.2; k grows with C as there with gamma = 2 and b = 1, and is rounded as in the
    released code.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        size = int((math.log2(channels) + 1) / 2) | 1  # odd
        self.conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3))
        gate = torch.sigmoid(self.conv(means[:, None])[:, 0])
        return x * gate[:, :, None, None]


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each position of x [B,C,h,w]."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def shortcut(in_channels: int, out_channels: int) -> nn.Module:
    """The way past a block: x itself, or a 1x1 convolution where the width changes."""
    return nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)


Block = ResidualBlock | ConvNeXtBlock
BLOCKS: Mapping[BlockType, type[ResidualBlock] | type[ConvNeXtBlock]] = {
    "residual": ResidualBlock,
    "convnext": ConvNeXtBlock,
    "channel_attention": ChannelAttentionBlock,
}


class DownBlock(nn.Module):
    """One level on the way down: x [B,C,h,w] -> x of half the size, and every feature map left for the way up.

    Down to the first attention to the context, of [kB,L,D], there may be only as many x as there are latents; `emb` is
    [kB,E] in any case.
    """

    def __init__(self, resnets: list[Block], attentions: list[SpatialTransformer], down: Downsample | None) -> None:
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(resnets), nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([] if down is None else [down])

    def forward(self, x: Tensor, emb: Tensor, context: Context) -> list[Tensor]:
        skips = []
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, emb[: len(x)])
            if self.attentions:
                x = self.attentions[index](x, context)
            skips.append(x)
        return skips + [downsample(x) for downsample in self.downsamplers]


class MidBlock(nn.Module):
    """Block, transformer, block at the smallest size."""

    def __init__(self, resnets: list[Block], attentions: list[SpatialTransformer]) -> None:
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(resnets), nn.ModuleList(attentions)

    def forward(self, x: Tensor, emb: Tensor, context: Context) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, emb[: len(x)]), context)
        out: Tensor = self.resnets[1](x, emb)
        return out


class UpBlock(nn.Module):
    """One level on the way up; each block takes the last of `skips` off the list and reads it too."""

    def __init__(self, resnets: list[Block], attentions: list[SpatialTransformer], up: Upsample | None) -> None:
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(resnets), nn.ModuleList(attentions)
        self.upsamplers = nn.ModuleList([] if up is None else [up])

    def forward(self, x: Tensor, skips: list[Tensor], emb: Tensor, context: Context) -> Tensor:
        for index, resnet in enumerate(self.resnets):
            x = resnet(torch.cat((x, skips.pop()), dim=1), emb)
            if self.attentions:
                x = self.attentions[index](x, context)
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[2:])
        return x
