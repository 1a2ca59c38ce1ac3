"""Small models, trained by the project's own scripts and presets; rendering by any sampler; what a pass costs."""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from evaluation.measurements import from_pixels, to_pixels
from picturebook import write_folder
from torch import Generator, Tensor

from ldm.denoiser import Denoiser, make_denoiser
from ldm.guidance import classifier_free
from ldm.samplers import Sampler
from ldm.unet import UNet
from pipelines import TextToImagePipeline
from pipelines.loading import DEFAULT_MODEL
from pipelines.runtime import pick_device, pick_dtype, prepare
from text_encoder import encode_prompts

CONFIGS = Path(__file__).parents[1] / "configs"
BATCH = 32
PASSES_OF_A_STEP = 3  # a training step costs about three forward passes: one there, two back
MOST_PICTURES = 20_000  # to train on
SIDE = 128  # pixels of the default model's pictures


def trained(folder: Path, preset: str, size: int, steps: int, settings: Mapping[str, Any]) -> Path:
    """The model folder that a training script makes of a preset, `settings` and pictures of `size`; made only once.

    `settings` are options of that script by their dotted names. A run that was cut short goes on where it was.

    Raises:
        ValueError: settings that the script refuses.
    """
    model, finished = folder / "model", folder / "finished"
    if finished.exists():
        return model
    shared = {
        "data.path": str(training_data(folder.parent, min(MOST_PICTURES, steps * BATCH), size)),
        "data.size": size,
        "loop.out": str(folder),
        "loop.steps": steps,
        "loop.batch_size": BATCH,
        "loop.warmup": min(200, steps // 10),
        "loop.sample_every": steps,
    }
    with redirect_stdout(sys.stderr):
        script, config = configured(preset, {**shared, **settings})
        script.train(config)
    finished.touch()
    return model


def configured(preset: str, settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """The training script of a preset, and its config with `settings` in it: options by their dotted names."""
    import train_autoencoder
    import train_unet
    from unet_training_config import UNetTrainingConfig

    from ldm.training.command_line import parse_config

    if preset == "picturebook_autoencoder":
        script, config_class = train_autoencoder, train_autoencoder.AutoencoderTrainingConfig
    else:
        script, config_class = train_unet, UNetTrainingConfig
    options = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
    return script, parse_config(config_class, "", ["--config", str(CONFIGS / f"{preset}.yaml"), *options])


def training_data(folder: Path, count: int, size: int) -> Path:
    """An imagefolder of the picturebook's seed 0, made only once."""
    data = folder / f"picturebook-{count}-{size}px"
    if not data.exists():
        staged = data.with_suffix(".part")
        write_folder(staged, count, seed=0, split="train", size=size)
        staged.rename(data)
    return data


def default_model() -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(DEFAULT_MODEL)


def denoiser(pipe: TextToImagePipeline, captions: Sequence[str], scale: float = 1.0) -> Denoiser:
    """The model's denoiser under as many captions as there will be pictures; `scale` is w + 1."""
    empty = [""] * len(captions)
    contexts = encode_prompts(pipe.text_encoder, pipe.tokenizer, captions, empty, batch=len(captions))
    ((cond, uncond),) = contexts.batches
    scheduler = pipe.model.scheduler
    denoise = make_denoiser(pipe.unet, pipe.schedule, scheduler.prediction)
    return scheduler.bounded(classifier_free(denoise, cond, uncond, scale))


@torch.no_grad()
def render(
    pipe: TextToImagePipeline, captions: Sequence[str], sample: Sampler, times: Tensor, scale: float = 1.0
) -> Tensor:
    """One picture a caption, rounded to 8 bits: [N,3,H,W] in [-1,1]. All that is random about picture i has seed i."""
    images = []
    for start in range(0, len(captions), BATCH):
        some = captions[start : start + BATCH]
        randn = _noise_of(range(start, start + len(some)))
        x = randn(torch.Size((len(some), *_latent_shape(pipe)))).to(pipe.device)
        x = sample(denoiser(pipe, some, scale), x, pipe.schedule, times, randn=randn)
        images.append(pipe.autoencoder.decode(x.to(pipe.autoencoder_dtype)).float().cpu())
    return from_pixels(to_pixels(torch.cat(images)))


def _noise_of(seeds: range) -> Callable[[torch.Size], Tensor]:
    generators = [Generator().manual_seed(seed) for seed in seeds]
    return lambda shape: torch.cat([torch.randn(1, *shape[1:], generator=generator) for generator in generators])


def _latent_shape(pipe: TextToImagePipeline) -> tuple[int, int, int]:
    height, width = (side // pipe.autoencoder.downsampling_factor for side in pipe.own_size)
    return pipe.autoencoder.config.latent_channels, height, width


def seconds_a_pass(pipe: TextToImagePipeline) -> float:
    """How long the U-Net takes for one picture, in a batch: measured."""
    x = torch.zeros(BATCH, *_latent_shape(pipe), device=pipe.device)
    denoise = denoiser(pipe, [""] * BATCH)
    return seconds_taken(lambda: denoise(x, torch.zeros(BATCH, dtype=torch.float64, device=pipe.device))) / BATCH


def seconds_a_pass_of(preset: str, settings: Mapping[str, Any], side: int, dtype: torch.dtype | None = None) -> float:
    """The same of a U-Net that is yet to be trained, on side x side positions; `dtype` None is the fastest."""
    _, config = configured(preset, settings)
    device = pick_device(None)
    unet = UNet(config.model)
    prepare(unet, device, dtype or pick_dtype(None, device))
    weights = next(unet.parameters())
    x = weights.new_zeros(BATCH, config.model.in_channels, side, side)
    context = weights.new_zeros(BATCH, 77, config.model.cross_attention_dim)
    return seconds_taken(lambda: unet(x, torch.zeros(BATCH, device=device), context)) / BATCH


@torch.no_grad()
def seconds_taken(call: Callable[[], object]) -> float:
    """How long a call takes once it has been made before."""
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
