"""diffusers' side of each comparison: its own modules and loops, as it comes and as its documentation tunes it.

https://huggingface.co/docs/diffusers/optimization/fp16 asks for half precision, channels_last and torch.compile.
"""

import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import logging
from torch import Tensor, nn

from pipelines.prediction_type import VELOCITY

logging.set_verbosity_error()  # it warns of `.to(dtype)` for modules that these networks do not have
Config = Mapping[str, Any]
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def make_part(part: str, config: Config, folder: Path | None) -> UNet2DConditionModel | AutoencoderKL:
    """A model's "unet" or "vae" in float32; its weights are the folder's, or else diffusers' own first ones, seed 0."""
    kind = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part]
    torch.manual_seed(0)
    module = kind.from_config(dict(config)) if folder is None else kind.from_pretrained(folder / part)
    return module.float().eval().requires_grad_(False)


def tuned(module: ModuleT, dtype: torch.dtype) -> ModuleT:
    """A copy in the dtype and in channels_last."""
    return deepcopy(module).to(dtype).to(memory_format=torch.channels_last)


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Compiled as documented; the search for the fastest kernels is for accelerators."""
    return torch.compile(function, mode="default" if device.type == "cpu" else "max-autotune", fullgraph=True)


def make_scheduler(process: Config, steps: int, device: torch.device) -> DDIMScheduler:
    scheduler = DDIMScheduler.from_config(dict(process))
    scheduler.set_timesteps(steps, device=device)
    return scheduler


def guided_steps(
    unet: Callable[..., Any], scheduler: DDIMScheduler, latents: Tensor, context: Tensor, times: Tensor, scale: float
) -> Tensor:
    """The loop of diffusers' text-to-image pipeline over some of the scheduler's times, without checks and progress.

    `context` [2B,L,D] has the unconditional half first.
    """
    for t in times:
        both = scheduler.scale_model_input(torch.cat([latents] * 2), t)
        output = unet(both, t, encoder_hidden_states=context, return_dict=False)[0]
        uncond, cond = output.chunk(2)
        output = uncond + scale * (cond - uncond)
        latents = scheduler.step(output, t, latents, return_dict=False)[0]
    return latents


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    return vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]


def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    return vae.encode(images).latent_dist.mode() * vae.config.scaling_factor


class AsNetwork(nn.Module):
    """(x_t, t, context) -> output, as training calls a network."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.unet(x_t, t, context, return_dict=False)[0]


def example_training_step(
    unet: UNet2DConditionModel, process: Config, accelerator: Accelerator, moments: Tensor, context: Tensor
) -> Callable[[], None]:
    """A step of diffusers' `examples/text_to_image/train_text_to_image.py` with `--use_ema`, from latents and contexts
    that are encoded beforehand, with that script's defaults.
    """
    device = accelerator.device
    scheduler = DDPMScheduler.from_config(dict(process))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    ema = EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config)
    ema.to(device)
    unet, optimizer, rate = accelerator.prepare(unet, optimizer, get_scheduler("constant", optimizer))

    def step() -> None:
        with accelerator.accumulate(unet):
            latents = DiagonalGaussianDistribution(moments.to(device)).sample()
            noise = torch.randn_like(latents)
            t = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), device=device)
            noisy = scheduler.add_noise(latents, noise, t)
            velocity = scheduler.config.prediction_type == VELOCITY
            target = scheduler.get_velocity(latents, noise, t) if velocity else noise
            output = unet(noisy, t, context.to(device), return_dict=False)[0]
            loss = F.mse_loss(output.float(), target.float(), reduction="mean")
            accelerator.gather(loss.repeat(len(latents))).mean().item()  # it logs the loss of every step
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            ema.step(unet.parameters())

    return step


def load_tuned_pipeline(folder: Path, device: torch.device, dtype: torch.dtype) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, safety_checker=None).to(device)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    return pipe


def render(
    folder: str,
    file: str,
    prompt: str,
    seed: str,
    size: str,
    steps: str,
    guidance: str,
    device: str,
    dtype: str,
    layout: str,
) -> None:
    """The script that a user of diffusers would write; every argument is one of its command line's.

    The noise is drawn in float32 whatever the dtype, so that the pictures can be compared.
    """
    import torch
    from diffusers import StableDiffusionPipeline

    precision = getattr(torch, dtype)
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=precision, safety_checker=None).to(device)
    if layout == "channels_last":
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    side = int(size) // pipe.vae_scale_factor
    generator = torch.Generator().manual_seed(int(seed))
    noise = torch.randn(1, pipe.unet.config.in_channels, side, side, generator=generator)
    image = pipe(
        prompt,
        height=int(size),
        width=int(size),
        num_inference_steps=int(steps),
        guidance_scale=float(guidance),
        latents=noise.to(device, precision),
    ).images[0]
    image.save(file)


def write_script(file: Path) -> None:
    """Writes `render` as a program of its own, which says last how many bytes of an accelerator it had at most."""
    file.write_text(
        f"import sys\n\n{inspect.getsource(render)}\n\nrender(*sys.argv[1:])\n"
        "import torch\nprint(torch.cuda.max_memory_allocated())\n"
    )
