"""Merging averages what is most alike, and is exact where every token of a square is the same."""

import pytest
import torch
from small_unet import CONFIG, random_unet
from torch import Tensor

from ldm.token_merging import TokenMerging, matching
from ldm.transformer import Attention


def inputs(size: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randn(shape, generator=generator) for shape in ((2, 4, size, size), (2, 5, 8))]
    return draw[0], torch.tensor([3, 500]), draw[1]


@pytest.mark.parametrize(("height", "width", "share"), [(4, 4, 0.5), (5, 3, 0.3), (6, 2, 0.75), (4, 4, 0.0)])
def test_merged_tokens_are_means_of_the_most_alike(height: int, width: int, share: float) -> None:
    tokens = torch.randn(1, height * width, 7, generator=torch.Generator().manual_seed(0))
    merge, unmerge = matching(tokens, height, width, share)
    x = tokens[0]
    first = [i for i in range(len(x)) if i // width % 2 == 0 and i % width % 2 == 0]
    others = [i for i in range(len(x)) if i not in first]
    unit = x / x.norm(dim=1, keepdim=True)
    best = {i: max(first, key=lambda j: float(unit[i] @ unit[j])) for i in others}
    away = sorted(others, key=lambda i: -float(unit[i] @ unit[best[i]]))[: int(share * len(x))]
    means = {j: torch.stack([x[j], *(x[i] for i in away if best[i] == j)]).mean(0) for j in first}
    expected = torch.stack([means[i] if i in first else means[best[i]] if i in away else x[i] for i in range(len(x))])
    assert merge(tokens).shape == (1, len(x) - len(away), 7)
    torch.testing.assert_close(unmerge(merge(tokens))[0], expected)


def test_attention_over_squares_of_equal_tokens_is_exact() -> None:
    torch.manual_seed(0)
    attention = Attention(8, 2)
    squares = torch.randn(3, 8, 3, 3).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    tokens = squares.flatten(2).transpose(1, 2)
    merge, unmerge = matching(tokens, 6, 6, 0.75)
    assert merge(tokens).shape[1] == 9
    torch.testing.assert_close(unmerge(attention(merge(tokens))), attention(tokens), atol=1e-5, rtol=1e-5)


def test_a_share_of_zero_changes_nothing_and_more_changes_more() -> None:
    unet = random_unet()
    exact = unet(*inputs())
    errors = [(TokenMerging(unet, unet, share)(*inputs()) - exact).abs().mean() for share in (0, 0.1, 0.75)]
    assert errors[0] < 1e-5
    assert errors[0] < errors[1] < errors[2]
    assert torch.equal(unet(*inputs()), exact)  # the U-Net itself is as it was


def test_only_the_first_attending_level_sees_fewer_tokens() -> None:
    unet = random_unet()
    seen: dict[str, list[int]] = {}
    for name, module in unet.named_modules():
        if name.endswith("attn1"):
            module.register_forward_hook(
                lambda _, given, __, name=name: seen.setdefault(name, []).append(given[0].shape[1])
            )
    TokenMerging(unet, unet, 0.5)(*inputs())
    assert {name: counts for name, counts in seen.items()} == {
        name: [9 if name.startswith("mid_block") else 18] for name in seen
    }
    assert len(seen) == 4


def test_a_level_without_attention_is_passed_over() -> None:
    levels = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = random_unet(CONFIG.model_copy(update=levels))
    assert TokenMerging(unet, unet, 0.5)(*inputs()).shape == (2, 4, 6, 6)


def test_hooks_go_when_the_network_fails() -> None:
    unet = random_unet()
    latents, t, context = inputs()
    with pytest.raises(RuntimeError):
        TokenMerging(unet, unet, 0.5)(latents, t, context[..., :3])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


@pytest.mark.parametrize("share", [-0.1, 0.8])
def test_impossible_shares_are_refused(share: float) -> None:
    unet = random_unet()
    with pytest.raises(ValueError, match="share of tokens to merge is"):
        TokenMerging(unet, unet, share)


def test_a_context_is_read_once() -> None:
    unet = random_unet()
    merging, (latents, t, context) = TokenMerging(unet, unet, 0.5), inputs()
    torch.testing.assert_close(merging(latents, t, merging.read(context)), merging(latents, t, context))


def test_several_contexts_for_each_of_the_latents() -> None:
    unet = random_unet()
    (latents, t, _), contexts = inputs(), torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(4))
    merging = TokenMerging(unet, unet, 0.5)
    expected = merging(torch.cat([latents] * 2), t.repeat(2), contexts)
    torch.testing.assert_close(merging(latents, t, merging.read(contexts)), expected)
    assert not torch.allclose(unet(latents, t, contexts), expected, atol=1e-3)
