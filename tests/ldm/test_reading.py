"""Keys and values of a context that are made once: the same outputs to the bit, wherever a context may be given."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.conditioning import Concatenated, Labelled
from ldm.denoiser import in_turn, make_denoiser
from ldm.guidance import classifier_free, clip
from ldm.samplers import sample_ddim
from ldm.schedule import NoiseSchedule
from ldm.transformer import TransformerBlock
from ldm.unet import UNet

SCHEDULE = NoiseSchedule("scaled_linear")
BATCH = 2
CONFIG: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 20,
    "norm_num_groups": 8,
}
ATTENTIONS = 1 + 1 + 2  # down, middle, up


def make_unet(**change: Any) -> UNet:
    """Every parameter is drawn anew, so that nothing is zero."""
    unet = UNet.from_diffusers_config({**CONFIG, **change}).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return unet


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_t, t, cond, uncond."""
    generator = torch.Generator().manual_seed(1)
    x_t, (cond, uncond) = (torch.randn(*shape, generator=generator) for shape in ((BATCH, 4, 9, 8), (2, BATCH, 7, 20)))
    return x_t, torch.tensor([999.0, 3.5], dtype=torch.float64), cond, uncond


@pytest.fixture
def counted() -> Iterator[list[nn.Module]]:
    """Every projection to keys that runs, of a context or of x itself."""
    calls: list[nn.Module] = []

    def count(module: nn.Module, args: Any, output: Tensor) -> None:
        if isinstance(module, nn.Linear) and module.in_features == CONFIG["cross_attention_dim"]:
            calls.append(module)

    handle = nn.modules.module.register_module_forward_hook(count)
    yield calls
    handle.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", [{}, {"use_linear_projection": True, "block_type": "convnext"}], ids=str)
@torch.no_grad()
def test_a_reading_stands_for_its_context_to_the_bit(
    change: dict[str, Any], dtype: torch.dtype, inputs: tuple[Tensor, ...]
) -> None:
    x_t, t, cond, uncond = inputs
    unet = make_unet(**change).to(dtype)
    x_t, cond, uncond = x_t.to(dtype), cond.to(dtype), uncond.to(dtype)
    reading = unet.read(cond)
    assert len(reading) == BATCH
    assert len(reading.of) == ATTENTIONS
    for times in (t, t.flip(0)):
        assert torch.equal(unet(x_t, times, reading), unet(x_t, times, cond))
    assert not torch.equal(unet(x_t, t, unet.read(uncond)), unet(x_t, t, reading))


@torch.no_grad()
def test_a_network_keeps_nothing_of_what_it_read(inputs: tuple[Tensor, ...]) -> None:
    x_t, t, cond, uncond = inputs
    unet = make_unet()
    before, names = unet(x_t, t, cond), list(unet.state_dict())
    reading = unet.read(cond)
    assert list(unet.state_dict()) == names
    assert not torch.equal(unet(x_t, t, uncond), before)
    for block in unet.modules():
        if isinstance(block, TransformerBlock):
            block.attn2.to_v.weight.mul_(2)
    assert torch.equal(unet(x_t, t, reading), before)
    assert not torch.equal(unet(x_t, t, cond), before)
    assert torch.equal(unet(x_t, t, unet.read(cond)), unet(x_t, t, cond))


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
def test_guidance_reads_once_for_all_steps(scale: float, inputs: tuple[Tensor, ...], counted: list[nn.Module]) -> None:
    x_t, _, cond, uncond = inputs
    unet = make_unet().requires_grad_(False)
    grid = SCHEDULE.timesteps(5, "trailing")
    guided = classifier_free(make_denoiser(unet, SCHEDULE, "v"), cond, uncond, scale)
    out = sample_ddim(guided, x_t, SCHEDULE, grid)
    assert len(counted) == 2 * ATTENTIONS
    unread = classifier_free(make_denoiser(unet.forward, SCHEDULE, "v"), cond, uncond, scale)
    torch.testing.assert_close(sample_ddim(unread, x_t, SCHEDULE, grid), out, rtol=0, atol=1e-5)
    assert len(counted) == 2 * ATTENTIONS * (1 + 5)


@torch.no_grad()
def test_a_reading_of_another_batch_is_refused(inputs: tuple[Tensor, ...]) -> None:
    x_t, t, cond, _ = inputs
    denoise = make_denoiser(make_unet(), SCHEDULE, "v")
    with pytest.raises(ValueError, match="context has a batch of 1, but x_t one of 2"):
        denoise(x_t, t, denoise.read(cond[:1]))


@torch.no_grad()
def test_a_context_is_read_in_the_dtype_of_the_network(inputs: tuple[Tensor, ...]) -> None:
    x_t, t, cond, _ = inputs
    denoise = make_denoiser(make_unet().bfloat16(), SCHEDULE, "v")
    read = denoise(x_t, t, denoise.read(cond.double()))
    assert torch.equal(read.x0, denoise(x_t, t, cond.double()).x0)
    assert read.x0.dtype == torch.float32


@torch.no_grad()
def test_parts_of_a_batch_read_each_their_own(inputs: tuple[Tensor, ...]) -> None:
    x_t, t, cond, uncond = inputs
    denoise = make_denoiser(make_unet(), SCHEDULE, "v")
    halves = [classifier_free(denoise, cond[i : i + 1], uncond[i : i + 1], 3.0) for i in range(BATCH)]
    whole = classifier_free(denoise, cond, uncond, 3.0)
    torch.testing.assert_close(in_turn(halves, [1, 1])(x_t, t).x0, whole(x_t, t).x0, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_network_that_cannot_read_is_given_its_context(inputs: tuple[Tensor, ...]) -> None:
    x_t, t, cond, uncond = inputs
    unet = make_unet(in_channels=7, num_class_embeds=5)
    extra, labels = torch.randn(BATCH, 3, 9, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([1, 4])

    def network(latents: Tensor, t: Tensor, context: Tensor) -> Tensor:
        inputs = torch.cat((latents, extra.repeat(2, 1, 1, 1)), dim=1)
        out: Tensor = unet(inputs, t, context, labels.repeat(2))
        return out

    told = Concatenated(Labelled(unet, labels), extra)
    guided = classifier_free(make_denoiser(told, SCHEDULE, "v"), cond, uncond, 3.0)
    by_hand = classifier_free(make_denoiser(network, SCHEDULE, "v"), cond, uncond, 3.0)
    assert torch.equal(guided(x_t, t).x0, by_hand(x_t, t).x0)


def test_gradients_pass_through_a_reading(inputs: tuple[Tensor, ...]) -> None:
    """To x_t, at one evaluation after the other, as guidance by a classifier of x0 needs them; and to the context."""
    x_t, t, cond, uncond = inputs
    unet = make_unet()

    def gradient(network: Any) -> tuple[Tensor, Tensor]:
        plain = classifier_free(make_denoiser(network, SCHEDULE, "v"), cond, uncond, 3.0)
        guided = clip(plain, lambda x0: x0.square().sum((1, 2, 3)), SCHEDULE, 0.1)
        first = guided(x_t, t).x0
        return first, guided(first, t).x0

    for read, unread in zip(gradient(unet), gradient(unet.forward), strict=True):
        torch.testing.assert_close(read, unread, rtol=1e-5, atol=1e-5)
    gradients = []
    for read in (unet.read, lambda context: context):
        context = cond.clone().requires_grad_()
        unet(x_t, t, read(context)).square().sum().backward()
        gradients.append(context.grad)
    torch.testing.assert_close(*gradients)


@torch.no_grad()
def test_a_reading_is_compiled_into_one_graph(inputs: tuple[Tensor, ...]) -> None:
    x_t, t, cond, uncond = inputs
    unet = make_unet()
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    for context in (cond, uncond):
        reading = unet.read(context)
        assert torch.equal(compiled(x_t, t, reading), unet(x_t, t, context))
