"""Wide 3x3 convolutions in float32 on a CPU, with a quarter of the multiplications.

Winograd's minimal filtering F(4x4, 3x3) as Lavin and Gray 2016 (arXiv 1509.09308, equation 12 and section 4.3) write
it: a tile of 4x4 outputs is A' [(G k G') * (B' d B)] A, where d is the 6x6 inputs that it sees, k the kernel and ' a
transpose. That is 36 products for each pair of channels where the definition takes 144, and over all tiles they are
products of matrices. Rounding errors are two to three times the definition's: a few millionths of what comes out.
"""

from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.layers import needs_gradient

OUT, IN = 4, 6
"""Outputs along each side of a tile, and the inputs that they see."""
G = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
TILES = 256
"""Tiles that are worked on at a time. What is made of them should fit a cache."""
KERNELS = 2**20
"""Kernels that are transformed at a time, which takes 151 MB."""
WIDE = 128
"""Channels in and out below which the sums around the products take as long as what they save."""
LARGE = 2**27
"""Channels in times channels out times positions of a picture below which something else takes as long: transforming
the kernels where positions are few, or starting each operation. The batch does not count, so that a picture is the same
in any."""


def use_winograd(module: nn.Module) -> None:
    """Has the wide 3x3 convolutions in a module computed this way where that is faster.

    Names and weights stay as they are.
    """
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d) and _is_plain(conv) and min(conv.in_channels, conv.out_channels) >= WIDE:
            conv._conv_forward = MethodType(_conv_forward, conv)  # type: ignore[method-assign]


def _is_plain(conv: nn.Conv2d) -> bool:
    """Whether it has kernels of 3x3, and height and width stay as they are."""
    geometry = conv.kernel_size, conv.stride, conv.padding, conv.dilation
    return geometry == ((3, 3), (1, 1), (1, 1), (1, 1)) and conv.groups == 1 and conv.padding_mode == "zeros"


def _conv_forward(conv: nn.Conv2d, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `nn.Conv2d.forward` calls, in its place."""
    if input.dtype == torch.float32 and is_large(input, weight, LARGE):
        return convolve(input, weight, bias)
    out: Tensor = nn.Conv2d._conv_forward(conv, input, weight, bias)
    return out


def is_large(x: Tensor, weight: Tensor, least: int) -> bool:
    """Whether a convolution on a CPU, of one dtype and without gradients, has at least so many channels in times
    channels out times positions of a picture.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and weight[:, :, 0, 0].numel() * x[0, 0].numel() >= least
        and not needs_gradient(x, weight)
        and not torch.compiler.is_compiling()  # it would unroll the loops
    )


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.conv2d(x, weight, bias, padding=1)` of x [B,C,h,w] and kernels [O,C,3,3], all in float32: [B,O,h,w].

    Both are best in channels_last memory, as what is returned is.
    """
    batch, _, height, width = x.shape
    down, across = -(-height // OUT), -(-width // OUT)
    out = x.new_empty(batch, down * OUT, across * OUT, len(weight))
    at_a_time = max(1, TILES // (batch * across))
    parts = -(-weight[:, :, 0, 0].numel() // KERNELS)
    biases = weight.new_zeros(len(weight)) if bias is None else bias
    for kernels, shift, made in zip(weight.chunk(parts), biases.chunk(parts), out.chunk(parts, -1), strict=True):
        transformed = _transform_kernels(kernels)
        for first in range(0, down, at_a_time):
            rows = min(at_a_time, down - first)
            tiles = _transform_inputs(_window(x, first, rows))
            products = torch.bmm(tiles.flatten(0, 1).flatten(1, 3), transformed)
            products = products.view(IN, IN, batch, rows, across, -1)
            products[1, 1] += shift  # A' makes of it one and the same for all outputs
            _transform_outputs(products, made[:, first * OUT : (first + rows) * OUT])
    return out[:, :height, :width].permute(0, 3, 1, 2)


def _window(x: Tensor, first: int, rows: int) -> Tensor:
    """What some rows of tiles see of x [B,C,h,w], zeros where that is outside: [B,h',w',C]."""
    height, width = x.shape[2:]
    top, bottom = first * OUT - 1, (first + rows) * OUT + 1
    seen = x[:, :, max(top, 0) : bottom].permute(0, 2, 3, 1)
    return F.pad(seen, (0, 0, 1, 1 + -width % OUT, max(-top, 0), max(bottom - height, 0)))


def _transform_kernels(weight: Tensor) -> Tensor:
    """G k G' of kernels k [O,C,3,3]: [36,C,O]."""
    g = weight.new_tensor(G)
    both_sides = torch.einsum("ia,jb->ijab", g, g).reshape(IN * IN, 9)
    return (both_sides @ weight.permute(0, 2, 3, 1).flatten(1, 2)).permute(1, 2, 0)


def _transform_inputs(window: Tensor) -> Tensor:
    """B' d B of the tiles d that overlap in a window [B,h,w,C]: [6,6,B,down,across,C]."""
    along_height = window.unfold(1, IN, OUT).movedim(-1, 0)
    halfway = window.new_empty(along_height.shape)
    _times_b(along_height, halfway)
    along_width = halfway.unfold(3, IN, OUT).movedim(-1, 0)
    tiles = window.new_empty(along_width.shape)
    _times_b(along_width, tiles.transpose(0, 1))
    return tiles


def _transform_outputs(products: Tensor, out: Tensor) -> None:
    """A' m A of the products m [6,6,B,down,across,O], written to out [B,4 down,4 across,O]."""
    _, _, batch, down, across, channels = products.shape
    halfway = products.new_empty(OUT, IN, batch, down, across, channels)
    _times_a(products, halfway)
    tiles = out.view(batch, down, OUT, across, OUT, channels)
    _times_a(halfway.transpose(0, 1), tiles.permute(4, 2, 0, 1, 3, 5))


def _times_b(d: Tensor, out: Tensor) -> None:
    """B' d along one side, to `out`: six sums of the six inputs."""
    torch.sub(d[4], d[2], alpha=5, out=out[0]).add_(d[0], alpha=4)
    even, odd = torch.sub(d[4], d[2], alpha=4), torch.sub(d[3], d[1], alpha=4)
    torch.add(even, odd, out=out[1])
    torch.sub(even, odd, out=out[2])
    torch.sub(d[4], d[2], out=even)
    torch.sub(d[3], d[1], out=odd)
    torch.add(even, odd, alpha=2, out=out[3])
    torch.sub(even, odd, alpha=2, out=out[4])
    torch.sub(d[5], d[3], alpha=5, out=out[5]).add_(d[1], alpha=4)


def _times_a(m: Tensor, out: Tensor) -> None:
    """A' m along one side, to `out`: four sums of the six products."""
    sums, differences = (m[1] + m[2], m[3] + m[4]), (m[1] - m[2], m[3] - m[4])
    torch.add(*sums, out=out[0]).add_(m[0])
    torch.add(*differences, alpha=2, out=out[1])
    torch.add(*sums, alpha=4, out=out[2])
    torch.add(*differences, alpha=8, out=out[3]).add_(m[5])
