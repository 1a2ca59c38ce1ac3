"""Attention by its formula, however computed; projections joined in memory; adapters and hooks in a block."""

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from ldm import transformer
from ldm.transformer import GEGLU, LONG, MANY_KEYS, MANY_TOKENS, Attention, TransformerBlock, attend, joined


@pytest.mark.parametrize(
    ("dtype", "off"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=str
)
@pytest.mark.parametrize("keys", [4, 77, 300, 600])
def test_attention_and_its_gradient_are_the_formulas(keys: int, dtype: torch.dtype, off: float) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, 3, n, 8, generator=generator).to(dtype) for n in (256, keys, keys, 256)]
    *given, grad = (each.requires_grad_() for each in drawn)
    *exact, exact_grad = (each.detach().double().requires_grad_() for each in drawn)
    out, (q, k, v) = attend(*given), exact
    scores = torch.einsum("bhnd,bhld->bhnl", q, k) / math.sqrt(8)
    expected = torch.einsum("bhnl,bhld->bhnd", scores.exp() / scores.exp().sum(-1, keepdim=True), v)
    found = out, *torch.autograd.grad(out, given, grad)
    for each, wanted in zip(found, (expected, *torch.autograd.grad(expected, exact, exact_grad)), strict=True):
        assert each.dtype == dtype
        assert (each.double() - wanted).norm() < off * wanted.norm()
    with torch.no_grad():
        assert (attend(*given).double() - expected).norm() < off * expected.norm()


@pytest.mark.parametrize(("keys", "read"), [(77, 80), (80, 80), (513, 513)])
@torch.no_grad()
def test_few_keys_are_filled_up_for_the_cpu(keys: int, read: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, fused = [], nn.functional.scaled_dot_product_attention

    def look(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append((k.shape[2], v.shape[2], bool(options)))
        return fused(q, k, v, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", look)
    attend(torch.randn(1, 2, 5, 8), *torch.randn(2, 1, 2, keys, 8))
    assert seen == [(read, read, read > keys)]


def by_the_formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever the fused kernel runs, on a CPU where attention goes in blocks."""
    calls, fused = [], nn.functional.scaled_dot_product_attention

    def count(*given: Tensor, **options: Any) -> Tensor:
        calls.append(1)
        return fused(*given, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", count)
    monkeypatch.setattr(transformer, "multiplies_bfloat16_by_vectors", lambda: True)
    return calls


@pytest.mark.parametrize("width", [8, 20, 64])
@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize(("queries", "keys"), [(512, 512), (700, 1001)])
@pytest.mark.parametrize("block", [2**17, 2**20, 2**24], ids=["rows of one head", "two heads or one", "all heads"])
@torch.no_grad()
def test_attention_in_blocks_is_the_formula(
    block: int,
    queries: int,
    keys: int,
    size: float,
    width: int,
    fused_calls: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At scores of this standard deviation the fused kernel, which keeps them in float32, is less far off, and bfloat16
    scores as they are are farther.
    """
    monkeypatch.setattr(transformer, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, max(queries, keys), 3, 3, width, generator=generator).bfloat16()
    q, k, v = tokens.transpose(1, 3).unbind(2)  # strided, as projections joined in memory leave them
    q, k, v = size * q[:, :, :queries], k[:, :, :keys], v[:, :, :keys]
    expected = by_the_formula(q, k, v)
    out = attend(q, k, v)
    assert not fused_calls
    assert out.dtype == torch.bfloat16
    fused = nn.functional.scaled_dot_product_attention(q, k, v)
    plain = (q * width**-0.5 @ k.transpose(-1, -2)).softmax(-1) @ v
    off, fused_off, plain_off = ((each.double() - expected).norm() / expected.norm() for each in (out, fused, plain))
    assert off < 5 * fused_off
    assert off < 0.8 * plain_off


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q[:, :, 1:], k, v),
        lambda q, k, v: (torch.cat([q, q], 2), k[:, :, 1:], v[:, :, 1:]),
        lambda q, k, v: (q.float(), k.float(), v.float()),
        lambda q, k, v: (q.requires_grad_(), k, v),
        lambda q, k, v: (q, k, v.requires_grad_()),
    ],
    ids=["short", "few keys", "float32", "gradient", "gradient of values"],
)
def test_other_attention_is_fused(change: Any, fused_calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    heads = LONG // MANY_KEYS // 1024
    q, k, v = (torch.randn(1, heads, n, 8, generator=generator).bfloat16() for n in (1024, MANY_KEYS, MANY_KEYS))
    attend(*change(q, k, v))
    assert len(fused_calls) == 1
    q, k, v = q.detach(), k.detach(), v.detach()
    attend(q, k, v)
    assert len(fused_calls) == 1
    monkeypatch.setattr(transformer, "multiplies_bfloat16_by_vectors", lambda: False)
    attend(q, k, v)
    assert len(fused_calls) == 2, "where the CPU multiplies whole matrices"


@pytest.mark.parametrize(
    ("dtype", "tokens", "grad", "by_vectors", "expected"),
    [
        (torch.bfloat16, MANY_TOKENS, False, True, 2),
        (torch.bfloat16, MANY_TOKENS - 1, False, True, 0),
        (torch.bfloat16, MANY_TOKENS, True, True, 0),
        (torch.bfloat16, MANY_TOKENS, False, False, 0),
        (torch.float32, MANY_TOKENS, False, True, 0),
    ],
)
def test_gates_are_the_formula_and_where_it_pays_by_a_convolution(
    dtype: torch.dtype, tokens: int, grad: bool, by_vectors: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer, x = GEGLU(24, 40).to(dtype), torch.randn(2, tokens, 24).to(dtype)
    values, gate = nn.functional.linear(x.double(), *(each.double() for each in layer.proj.parameters())).chunk(2, -1)
    formula = values * gate * (1 + torch.erf(gate / math.sqrt(2))) / 2
    convolution, calls = nn.functional.conv2d, []

    def count(*given: Tensor) -> Tensor:
        calls.append(given)
        return convolution(*given)

    monkeypatch.setattr(nn.functional, "conv2d", count)
    monkeypatch.setattr(transformer, "multiplies_bfloat16_by_vectors", lambda: by_vectors)
    with torch.set_grad_enabled(grad):
        out = layer(x)
    assert len(calls) == expected
    assert out.is_contiguous()
    assert (out.double() - formula).norm() < (0.01 if dtype == torch.bfloat16 else 1e-6) * formula.norm()


def projections(attention: Attention) -> tuple[Tensor, ...]:
    return attention.to_q.weight, attention.to_k.weight, attention.to_v.weight


def test_joined_projections_are_the_same_in_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    attention = Attention(16, 4).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in attention.state_dict().items()}
    x = torch.randn(2, 10, 16, requires_grad=True)
    expected = attention(x)
    (of_x,) = torch.autograd.grad(expected.sum(), x)
    attention.join()
    after = attention.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    together = joined(projections(attention))
    assert together is not None
    assert torch.equal(together, torch.cat(projections(attention)))
    assert together.data_ptr() == attention.to_q.weight.data_ptr()
    linear, widths = nn.functional.linear, []

    def count(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        widths.append(len(weight))
        return linear(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", count)
    out = attention(x)
    assert widths == [48, 16]
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], of_x)


@pytest.mark.parametrize(
    "change",
    [
        lambda attention: attention.double(),
        lambda attention: attention.requires_grad_(True),
        lambda attention: attention.to_k.weight.data.copy_(torch.zeros(16, 16)),
        lambda attention: setattr(attention.to_v.weight, "data", torch.zeros(16, 16)),
        lambda attention: setattr(attention.to_q.weight, "data", attention.to_q.weight.data.t()),
        lambda attention: setattr(attention.to_k.weight, "data", attention.to_v.weight.data),
        lambda attention: setattr(attention.to_k.weight, "data", torch.zeros(48, 16)[16:32]),
        lambda attention: attention.load_state_dict(Attention(16, 4).state_dict()),
        lambda attention: attention.load_state_dict(Attention(16, 4).state_dict(), assign=True),
    ],
    ids=["cast", "trained", "written", "replaced", "turned", "shared", "elsewhere", "loaded", "assigned"],
)
def test_what_happens_to_joined_weights_counts(change: Any) -> None:
    torch.manual_seed(0)
    attention, other = (Attention(16, 4).requires_grad_(False) for _ in range(2))
    attention.join()
    change(attention)
    other.to(attention.to_q.weight.dtype).load_state_dict(attention.state_dict())
    x = torch.randn(2, 10, 16, dtype=attention.to_q.weight.dtype)
    out = attention(x)
    torch.testing.assert_close(out, other(x))
    if out.requires_grad:
        out.sum().backward()
        assert all(weight.grad is not None for weight in projections(attention))


ATTENDING = ["to_q", "to_k", "to_v"]
TRANSFORMER = [*(f"attn{number}.{name}" for number in (1, 2) for name in (*ATTENDING, "to_out.0")), "ff.net.0.proj"]


@pytest.mark.parametrize("name", TRANSFORMER)
def test_an_adapter_in_place_of_a_linear_layer_works_and_learns(name: str) -> None:
    torch.manual_seed(0)
    block = TransformerBlock(16, 4, 8).requires_grad_(False)
    block.attn1.join()
    x, context = torch.randn(2, 10, 16), torch.randn(2, 5, 8)
    before = block(x, context)
    inject_adapter_in_model(LoraConfig(target_modules=[name], init_lora_weights=False), block)
    after = block(x, context)
    assert not torch.equal(after, before)
    after.sum().backward()
    learning = [parameter for parameter in block.parameters() if parameter.requires_grad]
    assert len(learning) == 2
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in learning)


@pytest.mark.parametrize("name", TRANSFORMER)
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_on_a_linear_layer_is_called(name: str, kind: str) -> None:
    block = TransformerBlock(16, 4, 8).requires_grad_(False)
    block.attn1.join()
    calls = []
    getattr(block.get_submodule(name), kind)(lambda *given: calls.append(given))
    block(torch.randn(2, 10, 16), torch.randn(2, 5, 8))
    assert len(calls) == 1
