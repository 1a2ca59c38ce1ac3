"""Convolutions of doubled maps against the definition in float64, and that they are used where they pay."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoder import model as autoencoder
from ldm import layers
from pipelines import doubling, runtime
from pipelines.doubling import convolve_by_differences
from pipelines.runtime import prepare

CPU = torch.device("cpu")
WIDE, SIDE = 128, 32  # together just large enough
SIZES = {autoencoder.Upsample: (), layers.Upsample: ((2 * SIDE, 2 * SIDE),)}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def definition(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


@pytest.fixture(params=SIZES, ids=["autoencoder", "U-Net"])
def layer(request: pytest.FixtureRequest) -> Any:
    """Ready for float32 on a CPU. Its inputs are `x()` and what `SIZES` has of it."""
    torch.manual_seed(0)
    made = request.param(WIDE)
    prepare(made, CPU, torch.float32)
    return made


def x(**options: Any) -> Tensor:
    return random(1, WIDE, SIDE, SIDE, seed=3).to(memory_format=torch.channels_last, **options)


@pytest.fixture
def by_differences(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []

    def count(*given: Tensor) -> Tensor:
        calls.append(1)
        return convolve_by_differences(*given)

    monkeypatch.setattr(doubling, "convolve_by_differences", count)
    return calls


@pytest.mark.parametrize("size", [(8, 8), (1, 1), (4, 5), (7, 30), (33, 18)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("positions", [2**11, 40, 1])
def test_is_the_convolution(
    size: tuple[int, int], layout: torch.memory_format, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doubling, "POSITIONS", positions)
    x, weight, bias = random(3, 5, *size), random(7, 5, 3, 3, seed=1) / 7, random(7, seed=2)
    x, weight, bias = (each.double() for each in (x, weight, bias))
    for offset in (bias, None):
        found = convolve_by_differences(x.to(memory_format=layout), weight.to(memory_format=layout), offset)
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found, definition(x, weight, offset), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("dtype", "times"), [(torch.float32, 3), (torch.bfloat16, 4)], ids=str)
def test_rounds_a_few_times_as_much_as_the_definition(dtype: torch.dtype, times: float) -> None:
    x, weight = random(1, 256, 16, 16).to(dtype), (random(256, 256, 3, 3, seed=1) / 48).to(dtype)
    exact = definition(x.double(), weight.double(), None)

    def error(found: Tensor) -> float:
        return (found - exact).square().mean().sqrt().item()

    assert error(definition(x, weight, None)) < error(convolve_by_differences(x, weight, None))
    assert error(convolve_by_differences(x, weight, None)) < times * error(definition(x, weight, None))


def test_a_network_made_ready_uses_it_where_it_pays(layer: Any, by_differences: list[int]) -> None:
    size, names = SIZES[type(layer)], list(layer.state_dict())
    found = layer(x(), *size)
    assert len(by_differences) == 1
    torch.testing.assert_close(found, definition(x(), layer.conv.weight, layer.conv.bias), atol=1e-5, rtol=0)
    assert list(layer.state_dict()) == names
    other = copy.deepcopy(layer)
    assert torch.equal(other(x(), *size), found)
    other.conv.weight.zero_()
    assert torch.equal(other(x(), *size), other.conv.bias[:, None, None].expand(1, WIDE, 2 * SIDE, 2 * SIDE))
    assert torch.equal(layer(x(), *size), found)
    assert len(by_differences) == 4


def test_others_are_left_as_they_are(layer: Any, by_differences: list[int]) -> None:
    size = SIZES[type(layer)]
    few = x()[:, :, 1:]
    layer(few, *(((2 * SIDE - 2, 2 * SIDE),) if size else ()))
    layer(x().requires_grad_(), *size)
    if size:
        assert layer(x(), (2 * SIDE - 1, 2 * SIDE)).shape[2:] == (2 * SIDE - 1, 2 * SIDE)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x(), *size), layer(x(), *size), atol=1e-5, rtol=0)
    assert len(by_differences) == 1, "in the last line alone"
    layer.requires_grad_(True)
    assert layer(x(), *size).requires_grad
    with torch.no_grad():
        layer(x(), *size)
    assert len(by_differences) == 2
    layer.requires_grad_(False)
    layer.bfloat16()
    with pytest.raises(RuntimeError, match="type"):
        layer(x(), *size)
    layer(x(dtype=torch.bfloat16), *size)
    assert len(by_differences) == 3


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_on_the_convolution_is_called(kind: str, by_differences: list[int]) -> None:
    layer, calls = layers.Upsample(WIDE), []
    prepare(layer, CPU, torch.float32)
    getattr(layer.conv, kind)(lambda *given: calls.append(given))
    layer(x(), (2 * SIDE, 2 * SIDE))
    assert (len(calls), len(by_differences)) == (1, 0)


def test_an_adapter_in_place_of_the_convolution_works(by_differences: list[int]) -> None:
    layer: Any = layers.Upsample(WIDE)
    prepare(layer, CPU, torch.float32)
    layer.conv = nn.Sequential(layer.conv, nn.Hardtanh(-0.1, 0.1))
    assert layer(x(), (2 * SIDE, 2 * SIDE)).abs().max() <= 0.1
    assert not by_differences


@pytest.mark.parametrize(
    ("dtype", "by_vectors", "expected"),
    [(torch.float32, False, 1), (torch.bfloat16, True, 1), (torch.bfloat16, False, 0)],
    ids=str,
)
def test_not_where_the_cpu_multiplies_whole_matrices(
    dtype: torch.dtype,
    by_vectors: bool,
    expected: int,
    by_differences: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runtime, "multiplies_bfloat16_by_vectors", lambda: by_vectors)
    layer = layers.Upsample(WIDE)
    prepare(layer, CPU, dtype)
    layer(x(dtype=dtype), (2 * SIDE, 2 * SIDE))
    assert len(by_differences) == expected
