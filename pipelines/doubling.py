"""3x3 convolutions of doubled feature maps on a CPU, with a quarter of the multiplications.

Along one side, a kernel's taps a, b, c meet the doubled values x[i], x[i] as

    out[2i]     = a x[i-1] + (b + c) x[i] = (a + b + c) x[i] - a (x[i] - x[i-1])
    out[2i + 1] = (a + b) x[i] + c x[i+1] = (a + b + c) x[i] + c (x[i+1] - x[i])

so that three products make two outputs where the definition takes six. Along both sides 9 make four instead of 36, each
a product of matrices: of the input or of differences in it, and of kernels or sums of them.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoder import model as autoencoder
from ldm import layers
from pipelines.winograd import is_large

POSITIONS = 2048
"""Before they are doubled, that are worked on at a time. What is made of them should fit a cache."""
LARGE = 2**24
"""Channels in times channels out times positions of a picture, before they are doubled, below which torch is as fast.
The batch does not count, so that a picture is the same in any."""

SUMS = ((1, 0, 0), (1, 1, 1), (0, 0, 1))
"""Of the three taps along one side, the kernels in its three products."""

Maps = tuple[Tensor, Tensor, Tensor]
"""Some rows [B,h,w,C], each less the row above it, and each row below less it; beyond the ends there are zeros."""


def use_doubling(module: nn.Module) -> None:
    """Has the upsampling layers in a U-Net or an autoencoder computed this way where that is faster.

    Names and weights stay as they are.
    """
    for part in module.modules():
        if isinstance(part, autoencoder.Upsample | layers.Upsample):
            part.forward = MethodType(_forward, part)  # type: ignore[method-assign]


def _forward(layer: Any, x: Tensor, *size: tuple[int, int]) -> Tensor:
    """In place of the layer's own; `size` is the U-Net's, which can be one less than the double."""
    (height, width), conv = x.shape[2:], layer.conv
    doubled = all(each == (2 * height, 2 * width) for each in size)
    if doubled and layers.untouched(conv, nn.Conv2d, layers.Conv3x3) and is_large(x, conv.weight, LARGE):
        return convolve_by_differences(x, conv.weight, conv.bias)
    out: Tensor = type(layer).forward(layer, x, *size)
    return out


def convolve_by_differences(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`conv2d(interpolate(x, scale_factor=2), weight, bias, padding=1)` of x [B,C,h,w] and kernels [O,C,3,3], all of
    one dtype: [B,O,2h,2w].

    Both are best in channels_last memory, as what is returned is.
    """
    batch, _, height, width = x.shape
    kernels = _kernels(weight)
    x = x.permute(0, 2, 3, 1)
    out = x.new_empty(batch, height, 2, width, 2, len(weight))
    rows = max(1, POSITIONS // (batch * width))
    for first in range(0, height, rows):
        last = min(first + rows, height)
        seen = F.pad(x[:, max(first - 1, 0) : last + 1], (0, 0, 0, 0, int(first == 0), int(last == height)))
        steps = torch.diff(seen, dim=1)
        _convolve_rows((seen[:, 1:-1], steps[:, :-1], steps[:, 1:]), kernels, bias, out[:, first:last])
    return out.view(batch, 2 * height, 2 * width, -1).permute(0, 3, 1, 2)


def _kernels(weight: Tensor) -> Tensor:
    """Of kernels [O,C,3,3] the first tap, the sum of all and the last, along the height and along the width:
    [3,3,O,C].
    """
    sums = weight.new_tensor(SUMS)
    both_ways = torch.kron(sums, sums)  # a product adds in float32, and rounds once
    kernels = both_ways @ weight.permute(0, 2, 3, 1).flatten(1, 2)
    return kernels.view(len(weight), 3, 3, -1).permute(1, 2, 0, 3)


def _convolve_rows(maps: Maps, kernels: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """To `out` [B,h,2,w,2,O]."""
    middle = _along_height(maps, kernels[:, 1], bias)
    before, after = zip(*map(_steps_along_width, maps), strict=True)
    for column, (steps, tap, sign) in enumerate(((before, 0, -1), (after, 2, 1))):
        aside = _along_height(steps, kernels[:, tap], None)
        for row in (0, 1):
            torch.add(middle[row], aside[row], alpha=sign, out=out[:, :, row, :, column])


def _along_height(maps: Maps, kernels: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The outputs in even rows and those in odd ones, [B,h,w,O] both."""
    (first, whole, last), (same, above, below) = kernels, (each.flatten(0, 2) for each in maps)
    even = F.linear(same, whole, bias)
    odd = torch.addmm(even, below, last.T)
    even.addmm_(above, first.T, alpha=-1)
    return even.view(*maps[0].shape[:3], -1), odd.view(*maps[0].shape[:3], -1)


def _steps_along_width(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [B,h,w,C] less what is before it, and what is after it less x; beyond the ends there are zeros."""
    steps = torch.diff(F.pad(x, (0, 0, 1, 1)), dim=2)
    return steps[:, :, :-1], steps[:, :, 1:]
