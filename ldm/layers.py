"""The layers of the U-Net around its blocks and transformers: time embedding, group norm, resampling.

Attribute names are those of a published Stable Diffusion U-Net, so that its state dict loads without renaming. The last
layer of every residual branch starts at zero (Ho et al. 2020, arXiv 2006.11239, released code): a new network is the
identity along its residual stream.
"""

import math
from collections.abc import Callable, Sized
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def zeroed(module: AnyModule) -> AnyModule:
    """Set every parameter of `module` to zero and return it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def silu(x: Tensor) -> Tensor:
    """SiLU of an x that nothing else reads, in x's own memory unless a gradient will need it."""
    return F.silu(x, inplace=not x.requires_grad)


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether what is made of these now is recorded for a gradient."""
    return torch.is_grad_enabled() and any(each.requires_grad for each in tensors)


def untouched(layer: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a layer, of one of these kinds, is no more than its weights, so that these may be used without it: no
    adapter took its place, and nobody listens to it."""
    return type(layer) in kinds and not layer._forward_hooks and not layer._forward_pre_hooks


def made_again(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs), of which the inputs alone are kept for the gradient: what is between is made once more."""
    if not any(each.requires_grad for each in inputs):
        return function(*inputs)
    out: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return out


def as_many(x: Tensor, others: Sized) -> Tensor:
    """x [B,...] as often as there are others: all of it, then all of it again, [len(others),...].

    Raises ValueError where that is no whole number of times.
    """
    times, rest = divmod(len(others), len(x))
    if rest:
        raise ValueError(f"a batch of {len(others)} is no multiple of one of {len(x)}")
    return x if times == 1 else torch.cat([x] * times)  # which keeps the memory layout, as `repeat` does not


VECTOR = 16  # numbers that torch's kernels on a CPU work on at once; what is left over they take singly
FEW = 1024
"""Positions below which group norm on a CPU goes through the channels of a group position by position, and so is four
times as slow in bfloat16 as in float32 if much is left over."""


class GroupNorm(nn.GroupNorm):
    """Group norm of x [B,C,h,w] (Wu and He 2018, arXiv 1803.08494), by way of float32 where that is the faster."""

    def forward(self, input: Tensor) -> Tensor:
        width = self.num_channels // self.num_groups
        few = input.device.type == "cpu" and input[0, 0].numel() < FEW
        if few and input.dtype == torch.bfloat16 and width < 2 * VECTOR and width % VECTOR:
            out: Tensor = GroupNormInFloat32.apply(input, self.weight, self.bias, self.num_groups, self.eps)
            return out
        return super().forward(input)


class GroupNormInFloat32(torch.autograd.Function):
    """Keeps for the gradient what came in, and not what float32 makes of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        shape = len(x), x.shape[1], x[0, 0].numel(), groups
        out, mean, rstd = torch.native_group_norm(x.float(), weight.float(), bias.float(), *shape, eps)
        ctx.shape = shape
        ctx.save_for_backward(x, weight, mean, rstd)
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        grad = grad.float().contiguous(memory_format=torch.channels_last)
        given = grad, x.float(), mean, rstd, weight.float(), *ctx.shape
        of_x, of_weight, of_bias = torch.ops.aten.native_group_norm_backward(*given, (True, True, True))
        return of_x.to(x.dtype), of_weight.to(weight.dtype), of_bias.to(weight.dtype), None, None


def sinusoidal_embedding(t: Tensor, width: int, *, cosine_first: bool = True, shift: float = 0.0) -> Tensor:
    """Embed times t [B] as sines and cosines of geometrically spaced frequencies 1 ... 1/10000 (arXiv 1706.03762, 3.5).

    Returns [B, width] in t's dtype. `width` is even. `shift` is taken off the number of frequencies in their spacing.
    """
    assert width % 2 == 0, "half of the width are sines, half cosines"
    half = width // 2
    exponents = -math.log(10000) * torch.arange(half, dtype=t.dtype, device=t.device) / (half - shift)
    angles = t[:, None] * exponents.exp()
    parts = (angles.cos(), angles.sin()) if cosine_first else (angles.sin(), angles.cos())
    return torch.cat(parts, dim=-1)


class TimeEmbedding(nn.Module):
    """Two-layer perceptron on the sinusoidal embedding of times t [B], of any dtype: [B, features]."""

    def __init__(self, width: int, features: int, *, cosine_first: bool, shift: float) -> None:
        super().__init__()
        self.width, self.cosine_first, self.shift = width, cosine_first, shift
        self.linear_1 = nn.Linear(width, features)
        self.linear_2 = nn.Linear(features, features)

    def forward(self, t: Tensor) -> Tensor:
        dtype = self.linear_1.weight.dtype
        # bfloat16 cannot tell t = 999 from t = 1000: the sines are taken in float32 whatever the weights are.
        t = t.to(torch.promote_types(dtype, torch.float32))
        waves = sinusoidal_embedding(t, self.width, cosine_first=self.cosine_first, shift=self.shift)
        out: Tensor = self.linear_2(silu(self.linear_1(waves.to(dtype))))
        return out


RARE = 8  # times fewer positions than output channels: then a kernel is read more than it is used


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution that keeps height and width, or halves them, rounding up, with a stride of 2.

    On a CPU every convolution first reorders its kernel. Where there are few positions that takes as long as the rest,
    and a product of matrices, which reads the kernel as it lies in channels_last memory, is the faster one.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, 3, stride, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        batch, _, height, width = input.shape
        stride = self.stride[0]
        shape = batch, -(-height // stride), -(-width // stride)
        if input.requires_grad or input.device.type != "cpu" or RARE * math.prod(shape) > self.out_channels:
            return super().forward(input)
        padded = F.pad(input.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        windows = padded.unfold(1, 3, stride).unfold(2, 3, stride).permute(0, 1, 2, 4, 5, 3)
        out = F.linear(windows.reshape(*shape, -1), self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)
        return out.permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """Halve height and width, rounding up, by a strided convolution: [B,C,h,w] -> [B,C,ceil(h/2),ceil(w/2)]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class Upsample(nn.Module):
    """Enlarge x [B,C,h,w] to `size` by nearest neighbours, then convolve: [B,C,*size].

    The size is that of the skip connection it will meet, so odd heights and widths come back as they were.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, size=size, mode="nearest"))
        return out
