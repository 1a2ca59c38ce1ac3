"""How many bits real pictures cost under a model: the variational bound, all steps of the forward process."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from autoencoder import IdentityAutoencoder
from ldm.denoiser import ConditionalDenoiser, Estimate, make_denoiser
from ldm.likelihood import bound
from ldm.loss import Data
from ldm.posterior import Variance
from pipelines import TextToImagePipeline
from text_encoder import encode_prompts


def bits_per_dimension(pipe: TextToImagePipeline, images: Tensor, prompts: Sequence[str], seed: int) -> Tensor:
    """The bound of each picture [N,3,H,W] in [-1,1] given its caption, unguided, in bits per dimension: [N].

    Picture i draws its noise from a generator of `seed + i`. The variance is the model's own where it learned one, else
    beta (Ho et al. 2020, section 3.2).
    """
    latents = pipe.autoencoder.encode(images.to(pipe.device, pipe.autoencoder_dtype)).float()
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(images))]
    contexts = encode_prompts(pipe.text_encoder, pipe.tokenizer, prompts, [""] * len(prompts)).batches
    context = torch.cat([cond for cond, _ in contexts])
    schedule, scheduler = pipe.schedule, pipe.model.scheduler

    def randn(shape: torch.Size) -> Tensor:
        return torch.stack([torch.randn(shape[1:], generator=generator) for generator in generators])

    variance: Variance = "learned" if scheduler.learns_variance else "beta"
    grid = schedule.timesteps(schedule.steps, "linspace")
    denoise = scheduler.bounded(partial(_told, make_denoiser(pipe.unet, schedule, scheduler.prediction), context))
    return bound(denoise, latents, schedule, grid, variance=variance, data=_data(pipe), randn=randn).total.cpu()


def _told(denoise: ConditionalDenoiser, context: Tensor, x_t: Tensor, t: Tensor) -> Estimate:
    return denoise(x_t, t, context)


def _data(pipe: TextToImagePipeline) -> Data:
    return "8-bit" if isinstance(pipe.autoencoder, IdentityAutoencoder) else "continuous"


def bound_in_words(pipe: TextToImagePipeline) -> dict[str, str]:
    """Which bound it is, and of what."""
    steps = f"the variational bound of all {pipe.schedule.steps} steps, given the caption, unguided"
    if _data(pipe) == "8-bit":
        return {"bound": f"Upper bound on -log2 p of the 8-bit picture: {steps}", "of": "bits per pixel and colour"}
    return {
        "bound": f"Upper bound on -log2 of the density of the latents, which may be below 0: {steps}",
        "of": "bits per latent dimension",
    }
