"""Decoding in tiles, for pictures too large to be decoded at once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import ceil
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LatentDecoder(Protocol):
    """What every autoencoder is: latents [B,C,h,w] -> images [B,3,H,W], H = h * downsampling_factor."""

    @property
    def downsampling_factor(self) -> int: ...

    def decode(self, latents: Tensor) -> Tensor: ...


def decode_tiled(autoencoder: LatentDecoder, latents: Tensor, tile: int, overlap: int) -> Tensor:
    """Images [B,3,H,W] of scaled latents [B,C,h,w], decoded in overlapping squares that fade linearly into each other.

    A tile sees nothing beyond its edges. Group norms, which would look at all of a picture, look at all of it thinned
    out to one tile: else each tile would have its own colours. What differs from `decode` all the same, near a tile's
    edges and by attention, fades over the overlap without a seam.

    Args:
        tile: side of a tile, in latents, at most; latents that fit into one are decoded at once.
        overlap: of neighbouring tiles, in latents, at least; 0 shows seams.

    Raises:
        ValueError: the overlap is negative or as large as a tile.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap is {overlap} latents; give 0 to {tile - 1}, less than the tile's {tile}")
    if max(latents.shape[-2:]) <= tile:
        return autoencoder.decode(latents)
    return torch.cat([_decode_tiled(autoencoder, picture, tile, overlap) for picture in torch.split(latents, 1)])


def _decode_tiled(autoencoder: LatentDecoder, latents: Tensor, tile: int, overlap: int) -> Tensor:
    """Of one picture's latents [1,C,h,w]."""
    thinned_out = F.interpolate(latents, [min(side, tile) for side in latents.shape[-2:]], mode="nearest-exact")
    fade = partial(_in_parts, tile=tile, overlap=overlap, factor=autoencoder.downsampling_factor)
    with _norms_of(autoencoder, thinned_out):
        return fade(partial(fade, autoencoder.decode, dim=-1), latents, dim=-2)


def _in_parts(
    decode: Callable[[Tensor], Tensor], latents: Tensor, *, dim: int, tile: int, overlap: int, factor: int
) -> Tensor:
    """`decode(latents)`, at most `tile` latents along one dimension at a time; summed in float32 or better."""
    length = latents.shape[dim]
    starts, tile = divide(length, tile, overlap)
    parts = [decode(latents.narrow(dim, start, tile)) for start in starts]
    weights = tile_weights([factor * start for start in starts], factor * length, factor * tile, factor * overlap)
    shape, dtype = list(parts[0].shape), parts[0].dtype
    shape[dim] = factor * length
    images = parts[0].new_zeros(shape, dtype=torch.promote_types(dtype, torch.float32))
    for start, part, weight in zip(starts, parts, weights.to(images.device), strict=True):
        first, size = factor * start, factor * tile
        share = weight[first : first + size].reshape(-1, *[1] * (-1 - dim))
        images.narrow(dim, first, size).add_(share * part)
    return images.to(dtype)


def divide(length: int, tile: int, overlap: int) -> tuple[list[int], int]:
    """Where the tiles of one dimension start, and their side: as few as can overlap by that much, and as small.

    They are spread evenly from end to end.
    """
    if length <= tile:
        return [0], length
    steps = ceil((length - tile) / (tile - overlap))
    side = ceil((length + steps * overlap) / (steps + 1))
    return [index * (length - side) // steps for index in range(steps + 1)], side


def tile_weights(starts: list[int], length: int, tile: int, overlap: int) -> Tensor:
    """[tiles, length]: each tile's share of each pixel, rising and falling linearly over the overlaps.

    It is zero outside the tile, and the shares of a pixel sum to one.
    """
    pixels = torch.arange(length) + 0.5
    first = torch.tensor(starts)[:, None]
    rise, fall = (pixels - first) / overlap, (first + tile - pixels) / overlap
    rise[0] = fall[-1] = 1  # nothing fades at the picture's own edges
    shares = rise.clamp(0, 1) * fall.clamp(0, 1)
    return shares / shares.sum(0)


@contextmanager
def _norms_of(autoencoder: LatentDecoder, latents: Tensor) -> Iterator[None]:
    """Meanwhile each group norm takes the means and variances that it finds in decoding these latents [1,C,h,w]."""
    modules = autoencoder.modules() if isinstance(autoencoder, nn.Module) else ()
    norms = [module for module in modules if isinstance(module, nn.GroupNorm)]
    found: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = {}

    def normalize(norm: nn.GroupNorm, x: Tensor) -> Tensor:
        """In x's memory layout; statistics, [C] each, weight and bias in float32 or better."""
        exact = torch.promote_types(x.dtype, torch.float32)
        weight, bias = norm.weight.to(exact), norm.bias.to(exact)
        if norm not in found:
            channels, positions = x.shape[1], x[0, 0].numel()
            y, mean, scale = torch.native_group_norm(x, weight, bias, 1, channels, positions, norm.num_groups, norm.eps)
            width = channels // norm.num_groups
            found[norm] = mean[0].repeat_interleave(width), scale[0].repeat_interleave(width) ** -2
            return y
        return F.batch_norm(x, *found[norm], weight, bias, eps=0)

    for norm in norms:
        norm.forward = partial(normalize, norm)  # type: ignore[method-assign]
    try:
        autoencoder.decode(latents)
        yield
    finally:
        for norm in norms:
            del norm.forward
