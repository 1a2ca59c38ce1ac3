"""Winograd's convolutions against the definition in float64, and that they are used where they pay and nowhere else."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines import winograd
from pipelines.runtime import prepare
from pipelines.winograd import convolve, use_winograd

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wide(channels: int = 256, out: int = 128, **settings: int) -> nn.Conv2d:
    """Ready for float32 on a CPU."""
    conv = nn.Conv2d(channels, out, 3, **{"padding": 1, **settings})
    prepare(conv, CPU, torch.float32)
    return conv


def definition(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """What torch makes of it, to the bit."""
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


@pytest.mark.parametrize("size", [(8, 8), (1, 1), (4, 5), (7, 30), (33, 18)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_is_the_convolution(size: tuple[int, int], layout: torch.memory_format) -> None:
    x, weight, bias = random(3, 5, *size), random(7, 5, 3, 3, seed=1) / 7, random(7, seed=2)
    wanted = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    found = convolve(x.to(memory_format=layout), weight.to(memory_format=layout), bias)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found.double(), wanted, atol=2e-5, rtol=0)


def test_takes_no_bias() -> None:
    x, weight = random(1, 4, 8, 8), random(4, 4, 3, 3, seed=1) / 6
    torch.testing.assert_close(convolve(x, weight, None), F.conv2d(x, weight, padding=1), atol=2e-5, rtol=0)


@pytest.mark.parametrize("setting", ["TILES", "KERNELS"])
def test_is_the_same_in_small_parts(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = random(2, 6, 21, 13), random(10, 6, 3, 3, seed=1) / 7, random(10, seed=2)
    whole = convolve(x, weight, bias)
    monkeypatch.setattr(winograd, setting, 17)
    torch.testing.assert_close(convolve(x, weight, bias), whole, atol=2e-5, rtol=0)


def test_rounds_a_few_times_as_much_as_the_definition() -> None:
    x, weight = random(1, 256, 32, 32), random(256, 256, 3, 3, seed=1) / 48
    exact = F.conv2d(x.double(), weight.double(), padding=1)

    def error(found: Tensor) -> float:
        return (found - exact).square().mean().sqrt().item()

    assert error(F.conv2d(x, weight, padding=1)) < error(convolve(x, weight, None)) < 5e-6


def test_a_network_made_ready_uses_it_where_it_pays() -> None:
    conv, x = wide(), random(1, 256, 64, 64, seed=3)
    names = list(conv.state_dict())
    found = conv(x)
    assert torch.equal(found, convolve(x, conv.weight, conv.bias))
    assert not torch.equal(found, definition(conv, x)), "else this shows nothing"
    assert list(conv.state_dict()) == names
    assert torch.equal(copy.deepcopy(conv)(x), found)


def test_a_copy_uses_its_own_weights() -> None:
    conv, x = wide(), random(1, 256, 64, 64, seed=3)
    other = copy.deepcopy(conv)
    other.weight.zero_()
    assert torch.equal(other(x), other.bias[:, None, None].expand(1, 128, 64, 64))
    assert not torch.equal(conv(x), other(x))


@pytest.mark.parametrize("shape", [(1, 64, 60), (8, 32, 32)])
def test_few_positions_are_left_to_torch(shape: tuple[int, int, int]) -> None:
    conv, (batch, *size) = wide(), shape
    x = random(batch, 256, *size)
    assert torch.equal(conv(x), definition(conv, x))


@pytest.mark.parametrize(
    "settings",
    [{"stride": 2}, {"padding": 0}, {"dilation": 2, "padding": 2}, {"groups": 2}, {"channels": 120}],
    ids=lambda settings: next(iter(settings)),
)
def test_other_convolutions_are_left_to_torch(settings: dict[str, int]) -> None:
    conv = wide(**settings)
    x = random(1, conv.in_channels, 128, 128)
    assert torch.equal(conv(x), definition(conv, x))


def test_other_borders_are_left_to_torch() -> None:
    conv = nn.Conv2d(256, 128, 3, padding=1, padding_mode="circular").requires_grad_(False)
    x = random(1, 256, 64, 64)
    wanted = conv(x)
    use_winograd(conv)
    assert torch.equal(conv(x), wanted)


def test_half_precision_is_left_to_torch() -> None:
    conv, x = wide().bfloat16(), random(1, 256, 64, 64).bfloat16()
    assert torch.equal(conv(x), definition(conv, x))


def test_gradients_are_left_to_torch() -> None:
    conv, x = wide(), random(1, 256, 64, 64).requires_grad_()
    assert torch.equal(conv(x), definition(conv, x))
    with torch.no_grad():
        assert torch.equal(conv(x), convolve(x, conv.weight, conv.bias))
    conv.requires_grad_(True)
    found = conv(x.detach())
    assert found.requires_grad
    assert torch.equal(found, definition(conv, x.detach()))


def test_the_compiler_sees_a_plain_convolution() -> None:
    conv, x = wide(), random(1, 256, 64, 64)
    compiled = torch.compile(conv, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), definition(conv, x))
