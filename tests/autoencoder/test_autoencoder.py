"""The autoencoder against diffusers' `AutoencoderKL`."""

from typing import Any
from weakref import ref

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from autoencoder import Autoencoder, AutoencoderConfig
from autoencoder.model import Upsample

STABLE_DIFFUSION_1: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
PARAMETERS_OF_STABLE_DIFFUSION_1 = 83_653_863


def small(levels: int, attention: bool = True) -> dict[str, Any]:
    return {
        "block_out_channels": [8, 16, 24][:levels],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "latent_channels": 3,
        "scaling_factor": 0.3,
        "mid_block_add_attention": attention,
    }


def make_pair(config: dict[str, Any]) -> tuple[Autoencoder, AutoencoderKL]:
    torch.manual_seed(0)
    theirs = AutoencoderKL(**config).eval()
    with torch.no_grad():  # norms start as the identity, which would hide a missing one
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = Autoencoder.from_diffusers_config(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def pictures(count: int = 2, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@pytest.mark.parametrize("levels", [2, 3])
@pytest.mark.parametrize("attention", [True, False])
@torch.no_grad()
def test_equals_diffusers(levels: int, attention: bool) -> None:
    ours, theirs = make_pair(small(levels, attention))
    images = pictures()
    posterior = theirs.encode(images).latent_dist

    latents = ours.encode(images)
    assert latents.shape == (2, 3, 16 // ours.downsampling_factor, 16 // ours.downsampling_factor)
    torch.testing.assert_close(latents, posterior.mode() * 0.3, atol=1e-5, rtol=1e-5)

    sample = ours.encode(images, torch.Generator().manual_seed(5))
    torch.testing.assert_close(sample, posterior.sample(torch.Generator().manual_seed(5)) * 0.3, atol=1e-5, rtol=1e-5)
    one_for_each = ours.encode(images, generators(2))
    torch.testing.assert_close(one_for_each, posterior.sample(generators(2)) * 0.3, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(sample, latents, atol=1e-3)

    torch.testing.assert_close(ours.decode(latents), theirs.decode(latents / 0.3).sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 4)], ids=str)
@torch.no_grad()
def test_doubling_a_pixel_adds_up_the_taps_that_meet_it(size: tuple[int, int]) -> None:
    upsample = Upsample(6).to(torch.float64)
    x = torch.randn(2, 6, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    doubled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    out, expected = upsample(x), upsample.conv(doubled)
    # the kernels are added up in float32, which bfloat16 and float32 weights allow
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(upsample.float()(x.float()), expected.float(), atol=1e-5, rtol=1e-5)


def test_gradients_reach_what_is_upsampled() -> None:
    upsample = Upsample(6)
    x = torch.randn(1, 6, 3, 2, requires_grad=True)
    upsample(x).square().sum().backward()
    assert x.grad is not None
    assert upsample.conv.weight.grad.abs().min() > 0
    with torch.no_grad():
        torch.testing.assert_close(upsample(x), upsample(x.detach()))


@torch.no_grad()
def test_feature_maps_are_given_up_as_soon_as_they_are_used() -> None:
    decoder = Autoencoder.from_diffusers_config(small(2)).eval().decoder
    used: dict[str, ref[Tensor]] = {}
    gone: dict[str, bool] = {}
    last = decoder.up_blocks[-1]
    watched = {"a level's input": (decoder.up_blocks[0].upsamplers[0], last.resnets[1])}
    watched |= {f"inside block {i}": (block.conv1, block.conv2) for i, block in enumerate(last.resnets)}
    for name, (source, later) in watched.items():
        source.register_forward_hook(lambda _, __, out, name=name: used.update({name: ref(out)}))
        later.register_forward_pre_hook(lambda _, __, name=name: gone.update({name: used[name]() is None}))
    decoder(torch.randn(1, 3, 4, 4))
    assert gone == dict.fromkeys(watched, True)


@torch.no_grad()
def test_attention_at_the_lower_levels() -> None:
    down = ["DownEncoderBlock2D", *["AttnDownEncoderBlock2D"] * 2]
    up = [*["AttnUpDecoderBlock2D"] * 2, "UpDecoderBlock2D"]
    ours, theirs = make_pair({**small(3), "down_block_types": down, "up_block_types": up})
    latents = ours.encode(pictures())
    torch.testing.assert_close(latents, theirs.encode(pictures()).latent_dist.mode() * 0.3, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.decode(latents), theirs.decode(latents / 0.3).sample, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_pictures_need_not_be_square() -> None:
    ours, theirs = make_pair(small(2))
    images = pictures()[:, :, :8]
    latents = ours.encode(images)
    assert latents.shape == (2, 3, 4, 8)
    torch.testing.assert_close(ours.decode(latents), theirs.decode(latents / 0.3).sample, atol=1e-5, rtol=1e-5)


def test_stable_diffusion_1_has_the_same_keys_and_shapes() -> None:
    with torch.device("meta"):
        ours = Autoencoder.from_diffusers_config(STABLE_DIFFUSION_1)
        theirs = AutoencoderKL.from_config(STABLE_DIFFUSION_1)
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert sum(shape.numel() for shape in shapes.values()) == PARAMETERS_OF_STABLE_DIFFUSION_1
    assert ours.downsampling_factor == 8
    assert ours.config.scaling_factor == 0.18215


@torch.no_grad()
def test_forward_decodes_a_sample_of_the_posterior() -> None:
    ours, _ = make_pair(small(2))
    images = pictures()
    eps = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    reconstruction, posterior = ours(images, eps)
    latents = ours.encode(images, torch.Generator().manual_seed(5))
    torch.testing.assert_close(reconstruction, ours.decode(latents), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(posterior.mean, ours.encode(images) / 0.3, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_whiten_changes_the_latents_and_no_picture() -> None:
    ours, _ = make_pair({**small(3), "scaling_factor": 1.0})
    images = pictures(8)
    eps = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    decoded, sampled = ours.decode(ours.encode(images)), ours(images, eps)[0]
    latents = ours.encode(images)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3), correction=0)
    assert not torch.allclose(std, torch.ones(3), atol=0.05)

    ours.whiten(mean, std)

    white = ours.encode(images)
    torch.testing.assert_close(white.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(white.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.decode(white), decoded, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours(images, eps)[0], sampled, atol=1e-4, rtol=1e-4)


def test_wrong_number_of_generators() -> None:
    ours, _ = make_pair(small(2))
    with pytest.raises(ValueError, match="3 generators for 2 images"):
        ours.encode(pictures(), generators(3))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"act_fn": "mish"}, "act_fn"),
        ({"latent_channels": 0}, "latent_channels"),
        ({"shift_factor": 0.1}, "shift_factor"),
        ({"use_quant_conv": False}, "use_quant_conv"),
        ({"down_block_types": ["AttnDownBlock2D"] * 2}, "down_block_types"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "2 levels"),
        ({"norm_num_groups": 5}, "norm_num_groups"),
    ],
)
def test_unsupported_config(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Autoencoder.from_diffusers_config({**small(2), **change})


def test_config_survives_its_own_json() -> None:
    config = AutoencoderConfig.model_validate(small(3))
    assert AutoencoderConfig.model_validate_json(config.model_dump_json()) == config


def test_several_generators_draw_several_samples_of_one_picture() -> None:
    ours, _ = make_pair(small(2))
    one = pictures()[:1]
    torch.testing.assert_close(ours.encode(one, generators(3)), ours.encode(one.expand(3, -1, -1, -1), generators(3)))


@pytest.mark.parametrize(
    "change", [{"latent_channels": 2**31}, {"block_out_channels": [-64, 64]}, {"in_channels": 10**9}], ids=str
)
def test_absurd_sizes_are_refused(change: dict[str, Any]) -> None:
    ((name, _),) = change.items()
    with pytest.raises(ValueError, match=name):
        Autoencoder.from_diffusers_config({**small(2), **change})
