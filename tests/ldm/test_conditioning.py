"""Networks that are told more than the time and the context, as the denoiser and guidance use them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.conditioning import Concatenated, Labelled
from ldm.denoiser import make_denoiser
from ldm.guidance import classifier_free
from ldm.schedule import NoiseSchedule
from ldm.unet import UNet

SCHEDULE = NoiseSchedule("scaled_linear")
NULL = 5
CONFIG: dict[str, Any] = {
    "block_out_channels": (16,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 20,
    "norm_num_groups": 8,
}


def network(**change: Any) -> UNet:
    """A U-Net none of whose layers is zero any more."""
    torch.manual_seed(0)
    unet = UNet.from_diffusers_config({**CONFIG, **change})
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return unet.requires_grad_(False)


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_t, t, context, extra."""
    generator = torch.Generator().manual_seed(1)
    x_t, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 20, generator=generator)
    return x_t, torch.tensor([400.0, 30.0]), context, torch.randn(2, 5, 8, 8, generator=generator)


def assert_near(out: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_guidance_of_classes_starts_from_the_null_class() -> None:
    unet, (x_t, t, _, _), labels = network(num_class_embeds=NULL + 1), inputs(), torch.tensor([0, 3])
    nothing, null = torch.zeros(2, 1, 20), torch.full_like(labels, NULL)
    guided_by = make_denoiser(Labelled(unet, torch.cat([null, labels])), SCHEDULE, "eps")
    guided = classifier_free(guided_by, nothing, nothing, scale=3.0)(x_t, t)
    cond, uncond = unet(x_t, t, nothing, labels), unet(x_t, t, nothing, null)
    assert (cond - uncond).abs().max() > 0.1
    assert_near(guided.x0, guided_by.to_x0(uncond + 3 * (cond - uncond), x_t, t))


@pytest.mark.parametrize("told", [1, 2], ids=["one for all", "one each"])
def test_guidance_of_the_context_tells_both_halves_the_same(told: int) -> None:
    unet = network(num_class_embeds=NULL, in_channels=9)
    x_t, t, context, extra = inputs()
    labels = torch.tensor([0, 3])
    conditioned = Concatenated(Labelled(unet, labels[:told]), extra[:told])
    denoise = make_denoiser(conditioned, SCHEDULE, "v")
    guided = classifier_free(denoise, context, torch.zeros_like(context), scale=3.0)(x_t, t)
    x = torch.cat([x_t, extra[:told].expand(2, -1, -1, -1)], dim=1)
    cond, uncond = (unet(x, t, each, labels[:told].expand(2)) for each in (context, torch.zeros_like(context)))
    assert (cond - uncond).abs().max() > 0.01
    assert_near(guided.x0, denoise.to_x0(uncond + 3 * (cond - uncond), x_t, t))


def test_a_learned_variance_stands_beside_further_channels() -> None:
    unet, (x_t, t, context, extra) = network(in_channels=9, out_channels=8), inputs()
    denoise = make_denoiser(Concatenated(unet, extra), SCHEDULE, "eps")
    estimate = denoise(x_t, t, context)
    output, v = unet(torch.cat([x_t, extra], dim=1), t, context).chunk(2, dim=1)
    assert estimate.v is not None
    assert_near(estimate.v, v)
    assert_near(estimate.x0, denoise.to_x0(output, x_t, t))


def test_the_network_runs_in_its_own_dtype() -> None:
    x_t, t, context, extra = inputs()
    labels = torch.tensor([0, 3])

    def estimate(unet: UNet) -> Tensor:
        return make_denoiser(Concatenated(Labelled(unet, labels), extra), SCHEDULE, "v")(x_t, t, context).x0

    unet = network(num_class_embeds=NULL, in_channels=9)
    expected, out = estimate(unet), estimate(unet.bfloat16())
    assert out.dtype == torch.float32
    assert 0 < (out - expected).norm() < 0.03 * expected.norm()


def test_what_does_not_fit_the_latents_is_refused() -> None:
    unet, (x_t, t, context, extra) = network(in_channels=9), inputs()
    with pytest.raises(ValueError, match=r"extra is \(2, 5, 8, 4\), but the latents are \(2, 4, 8, 8\): resize it"):
        Concatenated(unet, extra[..., :4])(x_t, t, context)
    with pytest.raises(ValueError, match="a batch of 1 is no multiple of one of 2"):
        Concatenated(unet, extra)(x_t[:1], t[:1], context[:1])
    with pytest.raises(ValueError, match="a batch of 2 is no multiple of one of 3"):
        Labelled(unet, torch.tensor([0, 1, 2]))(x_t, t, context)
