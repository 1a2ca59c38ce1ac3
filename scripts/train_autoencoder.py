"""Train a KL or VQ autoencoder, with a patch discriminator late in training, on a folder of images.

    accelerate launch scripts/train_autoencoder.py --config scripts/configs/picturebook_autoencoder.yaml

Writes `OUT/model/vae` in the published layout, its latents whitened to mean 0 and std 1 per channel. The same command
again resumes; `--init FOLDER` starts from another model's autoencoder, also with a level more or fewer, for pictures of
twice or half the size. A U-Net that was trained on its latents keeps its worth if they stay as they are: to the bit
with `--decoder_only true`, nearly with `--latents_weight 1`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, model_validator
from sheet import to_images, write_sheet
from torch import Tensor, nn

from autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    IdentityAutoencoderConfig,
    VQAutoencoder,
    VQAutoencoderConfig,
)
from autoencoder.bottleneck import DiagonalGaussian, perplexity
from autoencoder.discriminator import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from autoencoder.growth import inner, levels_more, start_as
from autoencoder.loss import codebook_loss, kl_loss, reconstruction_loss
from ldm.training import randomness
from ldm.training.command_line import parse_config
from ldm.training.data import Batch, CaptionedImages, DataConfig
from ldm.training.loop import LoopConfig, Training, apply_gradients, fit, make_accelerator, make_ema, make_optimizers
from pipelines.errors import one_line_errors
from pipelines.loading import load_autoencoder, load_model, save_model, save_part
from pipelines.stored_model import INDEX

LEAST_JUDGED = 24
"""Pixels of the smallest pictures of which the discriminator sees a patch."""


class AdversaryConfig(BaseModel, frozen=True, extra="forbid"):
    """The patch discriminator's part."""

    start: int | None = Field(None, ge=0)
    """The step at which it joins; None: never."""
    warmup: int = Field(200, ge=0)
    """Steps in which it only learns, before its opinion counts."""
    weight: float = Field(0.2, gt=0)
    """Times the adaptive weight."""
    width: int = Field(32, ge=8)
    learning_rate: float = Field(2e-4, gt=0)


class AutoencoderTrainingConfig(BaseModel, frozen=True, extra="forbid"):
    data: DataConfig
    loop: LoopConfig
    model: AutoencoderConfig = AutoencoderConfig()
    vq: VQAutoencoderConfig | None = None
    """A VQ autoencoder, instead of `model`."""
    adversary: AdversaryConfig = AdversaryConfig()
    kl_weight: float = Field(1e-6, ge=0)
    codebook_weight: float = Field(1.0, ge=0)
    init: str | None = None
    """A model folder whose autoencoder to start from: of the same architecture, but for levels more or fewer next to
    the pixels."""
    decoder_only: bool = False
    """Train what turns latents into pictures and nothing else: those of `init` stay as they are, to the bit. What is
    not said of the autoencoder, and the size of its pictures, is as it is there."""
    latents_weight: float = Field(0, ge=0, allow_inf_nan=False)
    """Weight of the mean squared difference from the latents that `init` has for the same pictures, of its size. With
    any they are not whitened again, and if `init` is a whole model, one is written."""

    @model_validator(mode="before")
    @classmethod
    def _go_on(cls, said: dict[str, Any]) -> dict[str, Any]:
        if said.get("init") is None or not said.get("decoder_only"):
            return said
        theirs = load_autoencoder(Path(said["init"]) / "vae").config
        if isinstance(theirs, IdentityAutoencoderConfig):
            raise ValueError(f"init {said['init']} is a model of pixels and has no decoder: name another one")
        section, other = ("vq", "model") if isinstance(theirs, VQAutoencoderConfig) else ("model", "vq")
        merged, data = dict(said), said.get("data")
        if said.get(other) is None and isinstance(of_part := said.get(section) or {}, dict):
            merged[section] = theirs.model_dump(exclude_defaults=True) | of_part
        if isinstance(data, dict):
            merged["data"] = {"size": theirs.sample_size} | data
        return merged

    @model_validator(mode="after")
    def _check(self) -> Self:
        factor = (self.vq or self.model).downsampling_factor
        if self.data.size % factor:
            raise ValueError(f"data.size is {self.data.size}, but must be a multiple of {factor}, pixels per latent")
        start = self.adversary.start
        if start is not None and start < self.loop.steps and self.data.size < LEAST_JUDGED:
            raise ValueError(
                f"data.size is {self.data.size}, but the adversary needs pictures of {LEAST_JUDGED} pixels or more: "
                "leave out adversary.start"
            )
        if self.keeps_latents and self.init is None:
            name = "decoder_only" if self.decoder_only else "latents_weight"
            raise ValueError(f"{name} goes with init: say whose latents to keep")
        if self.decoder_only and self.latents_weight:
            raise ValueError("decoder_only keeps the latents as they are: leave out latents_weight")
        return self

    @property
    def keeps_latents(self) -> bool:
        """Whether the latents are to be those of `init`."""
        return self.decoder_only or self.latents_weight > 0


@dataclass
class Step:
    """One training step: the autoencoder's, and from `adversary.start` on the discriminator's too."""

    training: Training
    config: AutoencoderTrainingConfig
    autoencoder: nn.Module
    discriminator: nn.Module
    latents_of: Callable[[Tensor], Tensor] | None = None
    """The latents, scaled, that pictures ought to have, if they are not free."""

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        accelerator, adversary = self.training.accelerator, self.config.adversary
        images = batch.inputs.to(accelerator.device, memory_format=torch.channels_last, non_blocking=True)
        with accelerator.accumulate(self.autoencoder, self.discriminator):
            reconstruction, values = self._train_autoencoder(batch, images)
            if adversary.start is not None and batch.step >= adversary.start:
                values |= self._train_discriminator(images, reconstruction.detach())
        return values

    def _train_autoencoder(self, batch: Batch, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        config, accelerator = self.config, self.training.accelerator
        model = accelerator.unwrap_model(self.autoencoder)
        f = model.downsampling_factor
        shape = (model.config.latent_channels, images.shape[2] // f, images.shape[3] // f)
        eps = randomness.normal(shape, config.loop.seed, "posterior", batch.step, batch.positions)
        eps = eps.to(images.device, non_blocking=True)
        reconstruction, bottleneck = self.autoencoder(images, eps)
        pixels = reconstruction_loss(images, reconstruction)
        values = {"loss": pixels.detach(), "psnr": psnr(images, reconstruction.detach())}
        if isinstance(bottleneck, DiagonalGaussian):
            kl = kl_loss(bottleneck)
            loss = pixels + config.kl_weight * kl
            values["kl"] = kl.detach()
        else:
            codebook = codebook_loss(bottleneck)
            loss = pixels + config.codebook_weight * codebook
            values |= {"codebook": codebook.detach(), "perplexity": perplexity(accelerator.gather(bottleneck.indices))}
        if self.latents_of is not None:
            latents = bottleneck.mean if isinstance(bottleneck, DiagonalGaussian) else bottleneck.latents
            apart = F.mse_loss(latents.float() * model.config.scaling_factor, self.latents_of(images).float())
            loss = loss + config.latents_weight * apart
            values["latents"] = apart.detach()
        start = config.adversary.start
        if start is not None and batch.step >= start + config.adversary.warmup:
            self.discriminator.requires_grad_(False)  # else this step's gradients would reach the discriminator
            realism = generator_loss(self.discriminator(reconstruction))
            mean = partial(accelerator.reduce, reduction="mean")
            balance = adaptive_weight(pixels, realism, model.decoder.conv_out.weight, over_processes=mean)
            weight = config.adversary.weight * balance
            loss = loss + weight * realism
            self.discriminator.requires_grad_(True)
            values |= {"adversarial": realism.detach(), "adversarial_weight": weight}
        accelerator.backward(loss)
        values["gradient_norm"] = apply_gradients(self.training, self.autoencoder, self.training.optimizers[:-1])
        return reconstruction, values

    def _train_discriminator(self, images: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        real, fake = self.discriminator(images), self.discriminator(reconstruction)
        loss = discriminator_loss(real, fake)
        self.training.accelerator.backward(loss)
        norm = apply_gradients(self.training, self.discriminator, self.training.optimizers[-1:])
        values = {"discriminator": loss, "real": real.mean(), "fake": fake.mean(), "discriminator_gradient_norm": norm}
        return {name: value.detach() for name, value in values.items()}


def psnr(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Mean over pictures of 10 log10(2^2 / mean squared error), in dB."""
    error = (images - reconstruction.float()).square().mean((1, 2, 3))
    return (10 * (4 / error).log10()).mean()


@torch.no_grad()
def whiten(autoencoder: Autoencoder | VQAutoencoder, images: CaptionedImages, count: int) -> tuple[Tensor, Tensor]:
    """Measure the latents' mean and std per channel over `count` pictures, fold them in and return them."""
    device = next(autoencoder.parameters()).device
    sums, squares = torch.zeros(2, autoencoder.config.latent_channels, dtype=torch.float64)
    number = 0
    count = min(count, len(images))
    for start in range(0, count, 32):
        batch = images.images(start, min(start + 32, count)).to(device)
        posterior = autoencoder.posterior(batch)
        mean, variance = posterior.mean.double().cpu(), posterior.logvar.double().exp().cpu()
        sums += mean.sum((0, 2, 3))
        squares += (mean**2 + variance).sum((0, 2, 3))
        number += mean[:, 0].numel()
    mean = sums / number
    std = (squares / number - mean**2).sqrt()
    autoencoder.whiten(mean.float().to(device), std.float().to(device))
    return mean, std


def make_autoencoder(config: AutoencoderTrainingConfig) -> Autoencoder | VQAutoencoder:
    """A new autoencoder, unscaled, or that of `config.init`, all of it to be trained or the decoder only.

    Raises ValueError if that of `init` is of another architecture than the config's, but for levels next to the pixels.
    """
    shape = (config.vq or config.model).model_copy(update={"scaling_factor": 1.0})
    theirs = None if config.init is None else load_autoencoder(Path(config.init) / "vae").float()
    if theirs is not None and config.keeps_latents:
        shape = shape.model_copy(update={"scaling_factor": theirs.config.scaling_factor})
    autoencoder = VQAutoencoder(shape) if isinstance(shape, VQAutoencoderConfig) else Autoencoder(shape)
    if theirs is None:
        return autoencoder
    section, free = "vq" if config.vq else "model", {"sample_size", "scaling_factor", "force_upcast"}
    if type(theirs) is not type(autoencoder):
        kinds = type(theirs).__name__, type(autoencoder).__name__
        raise ValueError(f"init {config.init} has a {kinds[0]}, but {section} describes a {kinds[1]}: make them agree")
    levels = [len(each.block_out_channels) for each in (shape, theirs.config)]
    shared = max(levels) if config.decoder_only else min(levels)  # that many levels have to agree
    for name, wanted in shape:
        if name not in free and inner(theirs.config, name, shared) != inner(shape, name, shared):
            there = getattr(theirs.config, name)
            raise ValueError(
                f"init {config.init} has {name} {there}, but {section}.{name} is {wanted}: make them agree"
            )
    if config.decoder_only:  # as it is, scaling factor included
        theirs.requires_grad_(False)
        for part in (theirs.post_quant_conv, theirs.decoder):
            part.requires_grad_(True)
        return theirs
    start_as(autoencoder, theirs)
    return autoencoder


def latents_of_init(config: AutoencoderTrainingConfig, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What gives images [B,3,H,W] the latents [B,C,h,w], scaled, that `init` has for them at its own size."""
    trained = load_autoencoder(Path(str(config.init)) / "vae").float().requires_grad_(False)
    trained.to(device, memory_format=torch.channels_last)
    more = levels_more(config.vq or config.model, trained.config)

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        mode = "area" if more > 0 else "bilinear"
        return trained.encode(F.interpolate(images, scale_factor=0.5**more, mode=mode) if more else images)

    return encode


def save(config: AutoencoderTrainingConfig, autoencoder: Autoencoder | VQAutoencoder, images: CaptionedImages) -> None:
    """Writes `OUT/model/vae`, its latents whitened. Where they are those of `init`, all of that, if a whole model."""
    out = Path(config.loop.out) / "model"
    if not config.keeps_latents:
        mean, std = whiten(autoencoder, images, 2000)
        measured = {"mean": mean.tolist(), "std": std.tolist()}
        print("latents before whitening:", {name: [round(v, 3) for v in each] for name, each in measured.items()})
        save_part(out / "vae", autoencoder)
        return
    assert config.init is not None
    init = Path(config.init)
    dtype = next(load_autoencoder(init / "vae").parameters()).dtype  # in which its encoder is written without loss
    if not (init / INDEX).is_file():
        save_part(out / "vae", autoencoder, dtype)
        return
    model = load_model(init)
    unscored = model.settings.model_copy(update={"scores": {}})
    save_model(out, replace(model, autoencoder=autoencoder.to(dtype), settings=unscored))


def train(config: AutoencoderTrainingConfig) -> None:
    accelerator = make_accelerator(config.loop)
    torch.manual_seed(config.loop.seed)  # initial weights; all later randomness is counted
    autoencoder = make_autoencoder(config)
    discriminator = PatchDiscriminator(config.adversary.width)
    ema = make_ema(autoencoder, config.loop, accelerator.device)
    autoencoder.to(memory_format=torch.channels_last)
    discriminator.to(memory_format=torch.channels_last)
    optimizers = make_optimizers(autoencoder, config.loop)
    adversary = torch.optim.AdamW(
        discriminator.parameters(), config.adversary.learning_rate, betas=(0.5, 0.9), fused=True
    )
    prepared = accelerator.prepare(autoencoder, discriminator, *optimizers, adversary)
    images = CaptionedImages(config.data, config.loop.seed)
    training = Training(accelerator, config.loop, images, list(prepared[2:]), train_step=lambda batch: {})
    latents_of = latents_of_init(config, accelerator.device) if config.latents_weight else None
    training.train_step = Step(training, config, prepared[0], prepared[1], latents_of)
    training.averaged.append((ema, prepared[0]))
    fixed = images.images(0, min(16, len(images)))

    def sheet(file: Path) -> None:
        with torch.no_grad():
            averaged: Autoencoder | VQAutoencoder = ema.module
            decoded = averaged.decode(averaged.encode(fixed.to(accelerator.device)))
        write_sheet(file, to_images(torch.stack([fixed, decoded.cpu()], 1).flatten(0, 1)), columns=8)

    training.on_sample = sheet
    if fit(training) == config.loop.steps and accelerator.is_main_process:
        save(config, ema.module, images)
    accelerator.end_training()


def main() -> None:
    config = parse_config(AutoencoderTrainingConfig, (__doc__ or "").split("\n")[0])
    with one_line_errors():
        train(config)


if __name__ == "__main__":
    main()
