"""Decoding in parts against decoding at once."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from autoencoder import Autoencoder, AutoencoderConfig
from autoencoder.tiling import decode_tiled, divide, tile_weights

AWKWARD = [(64, 16, 4), (17, 8, 3), (23, 8, 7), (9, 8, 0), (31, 10, 5), (8, 8, 2), (5, 8, 4), (1, 1, 0), (100, 7, 6)]


class Stub:
    """Doubles the sides of what a function makes of the latents, and keeps the shapes that it was given."""

    downsampling_factor = 2

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        self.shapes: list[tuple[int, ...]] = []

    def decode(self, latents: Tensor) -> Tensor:
        self.shapes.append(tuple(latents.shape))
        images = self.function(latents)
        return images.repeat_interleave(2, 2).repeat_interleave(2, 3)


class PointwiseWithNorm(nn.Module):
    """Every pixel is that of its latent alone, but for what the norm sees."""

    downsampling_factor = 2

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.GroupNorm(2, 4)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def decode(self, latents: Tensor) -> Tensor:
        return Stub(self.norm).decode(latents)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def make_autoencoder(norms: bool) -> Autoencoder:
    torch.manual_seed(0)
    config = AutoencoderConfig(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    autoencoder = Autoencoder(config)
    if not norms:
        for module in list(autoencoder.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.GroupNorm):
                    setattr(module, name, nn.Identity())
    return autoencoder


@pytest.mark.parametrize(("length", "tile", "overlap"), AWKWARD)
def test_tiles_cover_the_length_and_overlap(length: int, tile: int, overlap: int) -> None:
    starts, side = divide(length, tile, overlap)
    assert starts[0] == 0
    assert starts[-1] == length - side
    assert side <= tile
    steps = [after - before for before, after in pairwise(starts)]
    assert all(0 < step <= side - overlap for step in steps)
    assert max(steps, default=0) - min(steps, default=0) <= 1
    fewer, smaller = len(starts) - 1, side - 1
    assert fewer == 0 or fewer * (tile - overlap) + overlap < length
    assert len(starts) * (smaller - overlap) + overlap < length


@pytest.mark.parametrize(("length", "tile", "overlap"), AWKWARD)
def test_weights_of_tiles_sum_to_one(length: int, tile: int, overlap: int) -> None:
    starts, side = divide(length, tile, overlap)
    weights = tile_weights(starts, length, side, overlap)
    torch.testing.assert_close(weights.sum(0), torch.ones(length), atol=1e-6, rtol=0)
    for start, weight in zip(starts, weights, strict=True):
        assert (weight[start : start + side] > 0).all()
        assert weight.count_nonzero() == side


def test_weights_rise_and_fall_linearly() -> None:
    first, second = tile_weights([0, 6], 14, 8, 2)
    assert first.tolist() == [1, 1, 1, 1, 1, 1, 0.75, 0.25, 0, 0, 0, 0, 0, 0]
    assert second.tolist() == first.flip(0).tolist()
    _, second = tile_weights([0, 2], 10, 8, 6)  # nothing fades where the picture itself starts
    torch.testing.assert_close(second, torch.tensor([0, 0, *(i / 12 for i in range(1, 13, 2)), 1, 1]))


@pytest.mark.parametrize(
    ("height", "width", "tile", "overlap"),
    [(17, 23, 8, 3), (9, 64, 16, 15), (8, 8, 8, 2), (5, 40, 12, 6), (31, 7, 10, 0)],
)
def test_pointwise_decoders_give_the_same(height: int, width: int, tile: int, overlap: int) -> None:
    latents = noise(2, 4, height, width)
    stub = Stub(torch.sin)
    images = decode_tiled(stub, latents, tile, overlap)
    assert all(max(shape[2:]) <= tile for shape in stub.shapes)
    torch.testing.assert_close(images, stub.decode(latents), atol=1e-6, rtol=0)


def test_latents_that_fit_into_a_tile_are_decoded_once() -> None:
    stub = Stub(lambda latents: latents - latents.mean())
    latents = noise(2, 4, 6, 8)
    images = decode_tiled(stub, latents, 8, 2)
    assert stub.shapes == [(2, 4, 6, 8)]
    assert torch.equal(images, stub.decode(latents))


@pytest.mark.parametrize(("overlap", "seams"), [(0, True), (4, False), (7, False)])
def test_tiles_of_different_brightness_show_no_seam(overlap: int, seams: bool) -> None:
    brightness = noise(100)
    left = iter(brightness.tolist())
    stub = Stub(lambda latents: torch.full_like(latents, next(left)))
    images = decode_tiled(stub, noise(1, 4, 30, 41), 12, overlap)
    used = brightness[: len(stub.shapes)]
    span = (used.max() - used.min()).item()
    step = max(images.diff(dim=dim).abs().max().item() for dim in (2, 3))
    assert (step > 0.4 * span) == seams
    if not seams:  # an overlap is twice as many pixels wide
        assert step <= span / (2 * overlap) * 1.001


@torch.no_grad()
def test_only_edges_differ_without_norms() -> None:
    """Without them the decoder looks no further than its convolutions, so what is far from edges is as if whole."""
    autoencoder = make_autoencoder(norms=False)
    latents = noise(1, 4, 16, 48)
    whole, tiled = autoencoder.decode(latents), decode_tiled(autoencoder, latents, 30, 6)
    left = slice(0, 2 * 15)  # 6 latents from where the second tile starts, and 12, the decoder's reach, from the end
    torch.testing.assert_close(tiled[..., left], whole[..., left], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(tiled, whole, atol=1e-5)


def uneven(height: int, width: int) -> Tensor:
    """Pairs of equal latents, brighter to the right: every other one has the statistics of all, and no tile has."""
    latents = noise(2, 4, height // 2, width // 2) + torch.linspace(-2, 2, width // 2)
    return latents.repeat_interleave(2, 2).repeat_interleave(2, 3)


@torch.no_grad()
def test_norms_see_all_of_the_picture() -> None:
    autoencoder = PointwiseWithNorm()
    latents = uneven(16, 32)
    whole, tiled = autoencoder.decode(latents), decode_tiled(autoencoder, latents, 16, 4)
    assert not torch.allclose(autoencoder.decode(latents[..., :16]), whole[..., :32], atol=0.5)
    # thinned out, the height is all there is, and each pair's half of the width
    torch.testing.assert_close(tiled, whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_norms_are_as_before_afterwards() -> None:
    autoencoder = make_autoencoder(norms=True)
    latents = uneven(8, 24)
    before = autoencoder.decode(latents)
    decode_tiled(autoencoder, latents, 16, 4)
    assert torch.equal(autoencoder.decode(latents), before)
    with pytest.raises(RuntimeError, match="channels"):
        decode_tiled(autoencoder, latents[:, :3], 16, 4)
    assert torch.equal(autoencoder.decode(latents), before)


@torch.no_grad()
def test_tiles_are_close_to_the_whole() -> None:
    autoencoder = make_autoencoder(norms=True)
    latents = 0.5 * noise(1, 4, 24, 48) + torch.linspace(-2, 2, 48)
    whole = autoencoder.decode(latents)
    difference = decode_tiled(autoencoder, latents, 16, 8) - whole
    assert difference.square().mean().sqrt() < 0.3 * whole.std()  # 0.21; by each tile's own norms 0.69


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_stays(dtype: torch.dtype) -> None:
    autoencoder = make_autoencoder(norms=True).to(dtype)
    images = decode_tiled(autoencoder, uneven(8, 24).to(dtype), 16, 4)
    assert images.dtype == dtype
    torch.testing.assert_close(
        images.float(), decode_tiled(autoencoder.float(), uneven(8, 24), 16, 4), atol=0.05, rtol=0.05
    )


@torch.no_grad()
def test_feature_maps_keep_their_memory_layout() -> None:
    autoencoder = make_autoencoder(norms=True).to(memory_format=torch.channels_last)
    norms = [module for module in autoencoder.decoder.modules() if isinstance(module, nn.GroupNorm)]
    seen: list[Tensor] = []
    for norm in norms:
        norm.register_forward_hook(lambda _, inputs, output: seen.extend((*inputs, output)))
    decode_tiled(autoencoder, uneven(8, 24), 16, 4)
    assert len(seen) == 2 * 2 * 3 * len(norms)  # in and out, of two pictures, thinned out and in two tiles
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in seen)


@pytest.mark.parametrize(("tile", "overlap"), [(8, 8), (8, -1), (0, 0)])
def test_impossible_overlap(tile: int, overlap: int) -> None:
    with pytest.raises(ValueError, match=f"overlap is {overlap} latents"):
        decode_tiled(Stub(torch.sin), noise(1, 4, 8, 8), tile, overlap)
