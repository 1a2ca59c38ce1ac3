"""The layers of the U-Net around its blocks: transformer blocks, time embedding, resampling.

Attribute names are those of a published Stable Diffusion U-Net, so that its state dict loads without renaming. The last
layer of every residual branch starts at zero (Ho et al. 2020, arXiv 2006.11239, released code): a new network is the
identity along its residual stream.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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


def made_again(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs), of which the inputs alone are kept for the gradient: what is between is made once more."""
    if not any(each.requires_grad for each in inputs):
        return function(*inputs)
    out: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return out


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


SHORT = 2**16  # queries times keys below which the plain formula is the faster one to train with on a CPU
FEW_KEYS = 512  # that the fused kernel of a CPU takes in one block


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v (arXiv 1706.03762, equation 1): q [B,H,N,d], k and v [B,H,L,d] -> [B,H,N,d].

    On a CPU the fused kernel's backward pass in bfloat16 takes two to four times as long as the plain formula's where
    sequences are short, though the formula is then worked out twice, so that no probabilities are kept meanwhile.
    The kernel reads `VECTOR` keys at once, and what is left over of its block one by one: CLIP's 77 keys take it twice
    as long as 80, of which three have no weight.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    keys = k.shape[-2]
    if q.requires_grad and q.dtype == torch.bfloat16 and q.shape[-2] * keys <= SHORT:
        return made_again(_attend_plainly, q, k, v)
    missing = -keys % VECTOR
    if missing == 0 or keys > FEW_KEYS:
        return F.scaled_dot_product_attention(q, k, v)
    k, v = (F.pad(each, (0, 0, 0, missing)) for each in (k, v))
    bias = q.new_zeros(keys + missing)
    bias[keys:] = -torch.inf
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(1, 1, 1, -1))


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v
    return out


def untouched(layer: nn.Module) -> bool:
    """Whether a linear layer is no more than its weights, so that these may be used without it: no adapter took its
    place, and nobody listens to it."""
    return type(layer) is nn.Linear and not layer._forward_hooks and not layer._forward_pre_hooks


def joined(matrices: Sequence[Tensor]) -> Tensor | None:
    """The matrix of the rows of all these, if they lie in memory one after the other, without gradients."""
    if torch.compiler.is_compiling():  # places in memory are not known there
        return None
    first = matrices[0]
    memory, end = first.untyped_storage().data_ptr(), first.storage_offset()
    for matrix in matrices:
        if matrix.requires_grad or not matrix.is_contiguous() or matrix.storage_offset() != end:
            return None
        if matrix.untyped_storage().data_ptr() != memory:
            return None
        end += matrix.numel()
    return first.as_strided((sum(map(len, matrices)), first.shape[1]), first.stride())


@dataclass(frozen=True)
class Reading:
    """What a network makes of a context [B,L,D] by itself, so that it need not be made again at every time: of each
    attention to it the keys and values, [B,H,L,d] both. `ldm.unet.UNet.read` makes one, of the weights of that moment.
    """

    of: Mapping["Attention", tuple[Tensor, Tensor]]

    def __len__(self) -> int:
        """B."""
        return len(next(iter(self.of.values()))[0])


Context = Tensor | Reading


class Attention(nn.Module):
    """Multi-head attention from x [B,N,C] to context [B,L,D], or to x itself (arXiv 1706.03762, equation 1)."""

    def __init__(self, channels: int, heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        source = channels if context_dim is None else context_dim
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(source, channels, bias=False)
        self.to_v = nn.Linear(source, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def join(self) -> None:
        """For self-attention without gradients: moves the weights of queries, keys and values to where each follows the
        other in memory, so that x is multiplied by all three at once. They stay three in name, in the state dict and in
        what they do; whatever moves or replaces one of them later takes them apart.
        """
        weights = self.to_q.weight, self.to_k.weight, self.to_v.weight
        together = torch.cat([weight.data for weight in weights])
        for weight, rows in zip(weights, torch.chunk(together, 3), strict=True):
            weight.data = rows

    def read(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of what is attended to: [B,L,D] -> [B,H,L,d] twice."""
        return self._heads(self.to_k(source)), self._heads(self.to_v(source))

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        q, k, v = self._read_itself(x) if context is None else (self._heads(self.to_q(x)), *self._look_up(context))
        mixed = attend(q, k, v)
        out: Tensor = self.to_out[0](mixed.transpose(1, 2).flatten(2))
        return out

    def _look_up(self, context: Context) -> tuple[Tensor, Tensor]:
        return context.of[self] if isinstance(context, Reading) else self.read(context)

    def _read_itself(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of x [B,N,C]: [B,H,N,d] thrice."""
        layers = self.to_q, self.to_k, self.to_v
        together = joined([layer.weight for layer in layers]) if all(map(untouched, layers)) else None
        if together is None:
            return self._heads(self.to_q(x)), *self.read(x)
        return tuple(self._heads(each) for each in F.linear(x, together).chunk(3, dim=-1))

    def _heads(self, tokens: Tensor) -> Tensor:
        """[B,N,C] -> [B,H,N,d]."""
        return tokens.view(*tokens.shape[:2], self.heads, -1).transpose(1, 2)


class GEGLU(nn.Module):
    """Linear layer whose output is gated by the GELU of a second one (arXiv 2002.05202, equation 6)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_features, 2 * out_features)

    def forward(self, x: Tensor) -> Tensor:
        return made_again(gated, *self._halves(x))  # GELUs alone would be a ninth of all that is kept

    def _halves(self, x: Tensor) -> tuple[Tensor, ...]:
        """Values and gates [B,N,D]. On a CPU each has a product of its own: halves of one tensor are strided, which
        slows down all that reads them."""
        if x.device.type == "cpu" and untouched(self.proj):
            each = zip(self.proj.weight.chunk(2), self.proj.bias.chunk(2), strict=True)
            return tuple(F.linear(x, weight, bias) for weight, bias in each)
        halves: tuple[Tensor, ...] = self.proj(x).chunk(2, dim=-1)
        return halves


def gated(values: Tensor, gate: Tensor) -> Tensor:
    return values * F.gelu(gate)


class FeedForward(nn.Module):
    """Gated perceptron on each token, four times as wide inside: [B,N,C] -> [B,N,C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # The published layout has a dropout at index 1; it holds no weights, but index 2 is the layer's name on disk.
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context, feed-forward: x [B,N,C], context [B,L,D] -> [B,N,C]."""

    def __init__(self, channels: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        out: Tensor = x + self.ff(self.norm3(x))
        return out


class TokenConv(nn.Conv2d):
    """A 1x1 convolution applied to tokens [B,N,C]: the weights of a `Conv2d`, the arithmetic of a `Linear`."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.flatten(1), self.bias)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map: x [B,C,h,w], context [B,L,D] -> [B,C,h,w].

    Rombach et al. 2022 (arXiv 2112.10752), section 3.3. `depth` is their number. All but the first start as the
    identity, so that a trained network can be made deeper. `linear` says how the projections around them are stored:
    as `Linear` (SD 2.x) or as 1x1 convolutions (SD 1.x).
    """

    def __init__(
        self, channels: int, heads: int, context_dim: int, groups: int, *, depth: int = 1, linear: bool
    ) -> None:
        super().__init__()
        projection = nn.Linear if linear else TokenConv
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = projection(channels, channels)
        blocks = [TransformerBlock(channels, heads, context_dim) for _ in range(depth)]
        for block in blocks[1:]:
            for last in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2]):
                zeroed(last)
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = zeroed(projection(channels, channels))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        # In channels_last memory the tokens are a view of the feature map, and so is the way back.
        tokens = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)
        tokens = self.proj_in(tokens)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        tokens = self.proj_out(tokens)
        out: Tensor = x + tokens.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
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
