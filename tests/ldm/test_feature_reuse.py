"""Shallow calls are the U-Net's own first and last layer on the deep features of an earlier call."""

import pytest
import torch
from small_unet import CONFIG, random_unet
from torch import Tensor

from ldm.feature_reuse import FeatureReuse
from ldm.unet import UNet

PLAIN = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}


def inputs(seed: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 4, 8, 8, generator=generator)
    return latents, torch.tensor(100 * seed), torch.randn(batch, 5, 8, generator=generator)


def deep_calls(unet: UNet) -> list[int]:
    """Grows by one whenever the middle of the U-Net runs."""
    calls: list[int] = []
    unet.mid_block.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("changes", [{}, PLAIN], ids=["attention", "plain"])
def test_a_shallow_call_on_the_same_input_is_the_whole_call(changes: dict[str, object]) -> None:
    unet = random_unet(CONFIG.model_copy(update=changes))
    calls = deep_calls(unet)
    reused = FeatureReuse(unet, 2)
    whole, shallow = reused(*inputs(1)), reused(*inputs(1))
    assert len(calls) == 1
    assert torch.equal(whole, unet(*inputs(1)))
    assert torch.equal(shallow, whole)


def test_a_shallow_call_sees_latents_time_and_context_but_not_their_depth() -> None:
    unet = random_unet()
    reused = FeatureReuse(unet, 2)
    reused(*inputs(1))
    other = reused(*inputs(2))
    first = reused.deep
    assert not torch.allclose(other, unet(*inputs(2)), atol=1e-3)  # an approximation
    latents, t, context = inputs(2)
    for changed in ((inputs(3)[0], t, context), (latents, inputs(3)[1], context), (latents, t, inputs(3)[2])):
        reused = FeatureReuse(unet, 2)
        reused(*inputs(1))
        assert not torch.allclose(reused(*changed), other, atol=1e-3)
        assert torch.equal(reused.deep, first)


@pytest.mark.parametrize(("every", "whole"), [(1, [1, 2, 3, 4, 5]), (2, [1, 1, 2, 2, 3]), (3, [1, 1, 1, 2, 2])])
def test_the_whole_u_net_runs_at_every_nth_call(every: int, whole: list[int]) -> None:
    unet = random_unet()
    calls = deep_calls(unet)
    reused, counts = FeatureReuse(unet, every), []
    for step in range(5):
        reused(*inputs(step))
        counts.append(len(calls))
    assert counts == whole


def test_whole_and_shallow_calls_take_several_contexts_for_each_of_the_latents() -> None:
    (latents, t, _), contexts = inputs(1), torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(4))
    few, many = (FeatureReuse(random_unet(), 2) for _ in range(2))
    for _ in range(2):
        expected = many(torch.cat([latents] * 3), t, contexts)
        torch.testing.assert_close(few(latents, t, few.read(contexts)), expected)
    assert few.since == 2


def test_another_batch_size_starts_anew() -> None:
    unet = random_unet()
    calls = deep_calls(unet)
    reused = FeatureReuse(unet, 3)
    for batch in (2, 2, 1, 1, 2):
        assert reused(*inputs(1, batch)).shape[0] == batch
    assert len(calls) == 3
    assert not any(module._forward_pre_hooks for module in unet.modules())


def test_less_than_one_step_is_refused() -> None:
    with pytest.raises(ValueError, match="reused for 0 steps; give at least 1"):
        FeatureReuse(random_unet(), 0)


def test_a_context_is_read_once_for_whole_and_shallow_calls() -> None:
    unet = random_unet()
    reused, (latents, t, context) = FeatureReuse(unet, 2), inputs(1)
    reading = reused.read(context)
    assert torch.equal(reused(latents, t, reading), unet(latents, t, context))
    assert torch.equal(reused(latents, t, reading), unet(latents, t, context))
