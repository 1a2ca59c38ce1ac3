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
        tile: side of a tile, in latents; latents that fit into one are decoded at once.
        overlap: of neighbouring tiles, in latents, at least; 0 shows seams.

    Raises:
        ValueError: the overlap is negative or as large as a tile.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap is {overlap} latents; give 0 to {tile - 1}, less than the tile's {tile}")
    sides = latents.shape[-2:]
    if max(sides) <= tile:
        return autoencoder.decode(latents)
    thinned_out = F.interpolate(latents, [min(side, tile) for side in sides], mode="nearest-exact")
    fade = partial(_in_parts, tile=tile, overlap=overlap, factor=autoencoder.downsampling_factor)
    with _norms_of(autoencoder, thinned_out):
        return fade(partial(fade, autoencoder.decode, dim=-1), latents, dim=-2)


def _in_parts(
    decode: Callable[[Tensor], Tensor], latents: Tensor, *, dim: int, tile: int, overlap: int, factor: int
) -> Tensor:
    """`decode(latents)`, `tile` latents along one dimension at a time; summed in float32 or better."""
    length = latents.shape[dim]
    starts = tile_starts(length, tile, overlap)
    parts = [decode(latents.narrow(dim, start, min(tile, length))) for start in starts]
    weights = tile_weights([factor * start for start in starts], factor * length, factor * tile, factor * overlap)
    shape, dtype = list(parts[0].shape), parts[0].dtype
    shape[dim] = factor * length
    images = parts[0].new_zeros(shape, dtype=torch.promote_types(dtype, torch.float32))
    for start, part, weight in zip(starts, parts, weights.to(images.device), strict=True):
        first, size = factor * start, part.shape[dim]
        share = weight[first : first + size].reshape(-1, *[1] * (-1 - dim))
        images.narrow(dim, first, size).add_(share * part)
    return images.to(dtype)


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where the tiles of one dimension start: as few as can overlap by that much, evenly spread from end to end."""
    steps = max(0, ceil((length - tile) / (tile - overlap)))
    return [index * (length - tile) // steps for index in range(steps + 1)] if steps else [0]


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
    """Meanwhile each group norm takes the means and variances that it finds in decoding these latents [B,C,h,w]."""
    modules = autoencoder.modules() if isinstance(autoencoder, nn.Module) else ()
    norms = [module for module in modules if isinstance(module, nn.GroupNorm)]
    found: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def hook(norm: nn.GroupNorm, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        (x,) = inputs
        groups = x.float().reshape(len(x), norm.num_groups, -1)
        if norm not in found:
            variance, mean = torch.var_mean(groups, 2, correction=0, keepdim=True)
            found[norm] = mean, (variance + norm.eps).rsqrt()
            return output
        mean, scale = found[norm]
        normal = ((groups - mean) * scale).reshape(x.shape).to(x.dtype)
        return normal * norm.weight[:, None, None] + norm.bias[:, None, None]

    handles = [norm.register_forward_hook(hook) for norm in norms]
    try:
        autoencoder.decode(latents)
        yield
    finally:
        for handle in handles:
            handle.remove()
