"""From what is asked for to the denoiser that a sampler runs: networks, guidance, shortcuts, and what is known."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.conditioning import Concatenated
from ldm.denoiser import Denoiser, in_turn, make_denoiser
from ldm.feature_reuse import FeatureReuse
from ldm.guidance import classifier_free, interval, keep_known
from ldm.prediction import Prediction
from ldm.schedule import NoiseSchedule
from ldm.token_merging import TokenMerging
from ldm.unet import UNet
from pipelines.image_to_image import Start
from pipelines.request import Request
from pipelines.scheduler_config import SchedulerConfig


def make_guided(
    unet: UNet,
    schedule: NoiseSchedule,
    scheduler: SchedulerConfig,
    request: Request,
    contexts: Sequence[tuple[Tensor, Tensor]],
    start: Start,
    first: float,
) -> Denoiser:
    """The denoiser of all pictures of a request, which the network sees in parts.

    Args:
        contexts: (cond, uncond) of each part, both [b,L,D].
        start: what sampling starts from, of all pictures.
        first: the first time of the sampler's grid.
    """
    sizes = [len(cond) for cond, _ in contexts]
    extras = [None] * len(sizes) if start.extra is None else torch.split(start.extra, sizes)
    denoise = in_turn(
        [_guided(unet, schedule, scheduler.prediction, request, *each) for each in zip(contexts, extras, strict=True)],
        sizes,
    )
    denoise = scheduler.bounded(denoise)
    if (known := start.known) is None:
        return denoise
    return keep_known(denoise, known.latents, known.noise, known.mask, schedule, start=first)


def _guided(
    unet: UNet,
    schedule: NoiseSchedule,
    prediction: Prediction,
    request: Request,
    contexts: tuple[Tensor, Tensor],
    extra: Tensor | None,
) -> Denoiser:
    """Of one part. `extra` [b,C,h,w] are the further channels of a network that inpaints."""
    network: nn.Module = unet
    if request.reuse > 1:
        network = FeatureReuse(unet, request.reuse)
    if request.merge_tokens > 0:
        network = TokenMerging(network, unet, request.merge_tokens)
    if extra is not None:
        network = Concatenated(network, extra)
    denoise = make_denoiser(network, schedule, prediction)
    guided = classifier_free(denoise, *contexts, scale=request.guidance, rescale=request.rescale)
    if request.guidance_interval is None:
        return guided
    plain = classifier_free(denoise, *contexts, scale=1.0)
    return interval(guided, plain, schedule, *request.guidance_interval)
