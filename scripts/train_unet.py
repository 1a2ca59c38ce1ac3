"""Train a text-to-image latent diffusion model: the U-Net and, unless told otherwise, the text encoder with it.

    accelerate launch scripts/train_unet.py --config scripts/configs/picturebook_unet.yaml

Needs an autoencoder (`train_autoencoder.py`) and a text encoder (`train_clip.py`), or a whole model's folder for both.
Without an autoencoder it trains on the pixels themselves.
Writes `OUT/model`, which `ldm render --model` and diffusers take. The same command again resumes; `--init FOLDER`
starts from another model's U-Net and text encoder. With `--objective.distill_guidance SCALE` it learns to do without
guidance what that model does with it.
"""

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from cached_encodings import CachedContexts, CaptionedLatents, cached_latents, encode_first, sample_posterior
from sheet import write_sheet
from torch import Tensor, nn
from unet_objective import HeldOut, Objective, Teacher
from unet_training_config import UNetTrainingConfig, check_parts, check_size

from autoencoder import IdentityAutoencoder, IdentityAutoencoderConfig
from ldm.training import randomness
from ldm.training.command_line import parse_config
from ldm.training.data import Batch, CaptionedDataset, CaptionedImages
from ldm.training.loop import (
    PRECISIONS,
    Training,
    apply_gradients,
    fit,
    make_accelerator,
    make_ema,
    make_optimizers,
)
from ldm.training.whitening import Whitening
from ldm.unet import UNet, UNetConfig
from pipelines import TextToImagePipeline
from pipelines.errors import one_line_errors
from pipelines.loading import Model, load_autoencoder, load_model, load_text_encoder, load_unet, save_model
from pipelines.runtime import prepare
from pipelines.settings import words_in
from text_encoder import TextEncoder, Tokenizer

SHOWN = 16  # pictures on a sample sheet
HELDOUT = 256
"""Pictures of `heldout` whose loss is measured."""
WHITENED = 4096
"""Captions, at most, whose contexts' mean and covariance are measured."""
PROCESS = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "rescale_betas_zero_snr",
    "prediction_type",
)
"""What a scheduler says that a teacher and its student must have alike."""
DTYPES = {name: dtype for dtype, name in PRECISIONS.items()}
MEANINGS = {
    "attention_head_dim": "heads",
    "num_attention_heads": "heads",
    "transformer_layers_per_block": "depths",
}
"""Keys of a U-Net's config that may be written in several ways, and the property that says what they mean."""


def _attention_or_same(old: str, new: str) -> bool:
    return new == old or new.startswith("CrossAttn")


GROWTH: dict[str, Callable[[Any, Any], bool]] = {
    "down_block_types": _attention_or_same,
    "up_block_types": _attention_or_same,
    "transformer_layers_per_block": operator.le,
}
"""What a network may have more of than the one that it goes on from: whether one level's old entry grows into a new."""


class Conditioned(nn.Module):
    """U-Net and text encoder as one network: (x_t [B,C,h,w], t [B], text) -> output like x_t.

    The text is token ids [B,L], or the context [B,L,D] that they were encoded to beforehand. The U-Net takes contexts
    whitened, if there is a whitening.
    """

    def __init__(self, unet: UNet, text_encoder: TextEncoder, whitening: Whitening | None) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        self.whitening = whitening

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        context = text if text.is_floating_point() else self.text_encoder(text)
        if self.whitening is not None:
            context = self.whitening(context)
        output: Tensor = self.unet(x_t, t, context)
        return output


@torch.no_grad()
def whitening_of(text_encoder: TextEncoder, tokenizer: Tokenizer, captions: list[str]) -> Whitening:
    """That of the contexts of the captions' words, or those of some thousands of captions, without the padding."""
    distinct = sorted(set(captions))
    ids = tokenizer(distinct[:: len(distinct) // WHITENED + 1]).ids
    device = next(text_encoder.parameters()).device
    end = (ids == tokenizer.end_id).int().argmax(1)
    words = torch.arange(ids.shape[1]) <= end[:, None]
    batches = zip(ids.split(64), words.split(64), strict=True)
    return Whitening.of(torch.cat([text_encoder(some.to(device)).cpu()[kept] for some, kept in batches]))


def with_dropout(batch: Batch, seed: int, share: float) -> list[str]:
    """The batch's captions, a share of them replaced by ""."""
    dropped = randomness.uniform(seed, "caption", batch.step, batch.positions) < share
    return ["" if drop else caption for caption, drop in zip(batch.captions, dropped, strict=True)]


def make_teacher(
    config: UNetTrainingConfig, text_encoder: TextEncoder, tokenizer: Tokenizer, dtype: torch.dtype
) -> Teacher | None:
    """The model in `init`, whose guidance is to be distilled, if it is.

    Raises ValueError if its noise, or what it predicts, is not the config's.
    """
    scale = config.objective.distill_guidance
    if scale is None:
        return None
    assert config.init is not None
    model = load_model(config.init)
    for name in PROCESS:
        there, wanted = getattr(model.scheduler, name), getattr(config.scheduler, name)
        if there != wanted:
            raise ValueError(
                f"init {config.init} has {name} {there}, but scheduler.{name} is {wanted}: make them agree"
            )
    device = next(text_encoder.parameters()).device
    prepare(model.unet, device, dtype)
    return Teacher(model.unet, text_encoder, tokenizer([""]).ids.to(device), model.scheduler, scale)


def make_heldout(config: UNetTrainingConfig, objective: Objective, tokenizer: Tokenizer) -> HeldOut:
    """The first pictures of `heldout`, or their latents."""
    assert config.heldout is not None
    images = CaptionedImages(config.data.model_copy(update={"path": config.heldout}), config.loop.seed)
    count = min(HELDOUT, len(images))
    ids = tokenizer(images.captions()[:count]).ids
    if config.autoencoder is None:
        return HeldOut(objective, images.images(0, count), ids)
    moments = encode_first(count, images, Path(config.autoencoder) / "vae", objective.accelerator.device)
    return HeldOut(objective, moments.float().chunk(2, dim=1)[0], ids)


def make_unet(config: UNetTrainingConfig, whitening: Whitening | None) -> UNet:
    """A new U-Net, or that of `config.init`, which may lack attention or be less deep: what is new starts as the
    identity.

    It takes contexts whitened, if there is a whitening; that of `config.init` takes them raw.

    Raises ValueError if `init` is otherwise of another architecture than the config's.
    """
    if config.init is None:
        return UNet(config.model)
    trained = load_unet(Path(config.init) / "unet").float()
    for name in UNetConfig.model_fields:
        meaning = MEANINGS.get(name, name)
        there, wanted = getattr(trained.config, meaning), getattr(config.model, meaning)
        grows = name in GROWTH and len(there) == len(wanted) and all(map(GROWTH[name], there, wanted))
        if name != "sample_size" and there != wanted and not grows:
            raise ValueError(f"init {config.init} has {name} {there}, but model.{name} is {wanted}: make them agree")
    if whitening is not None:
        trained = whitening.unfolded(trained)
    unet = UNet(config.model)
    unet.load_state_dict(trained.state_dict(), strict=False)  # what may be missing was checked above
    return unet


def make_network(
    config: UNetTrainingConfig, tokenizer: Tokenizer, captions: list[str], device: torch.device
) -> Conditioned:
    """U-Net and text encoder, new or those that are named, with the whitening that the captions ask for."""
    text_encoder = load_text_encoder(config.text_folder / "text_encoder").float().to(device)
    whitening = whitening_of(text_encoder, tokenizer, captions) if config.whiten_contexts else None
    torch.manual_seed(config.loop.seed)  # initial weights; all later randomness is counted
    network = Conditioned(make_unet(config, whitening), text_encoder, whitening)
    network.text_encoder.requires_grad_(config.train_text_encoder)
    return network.to(memory_format=torch.channels_last)


def make_text(
    config: UNetTrainingConfig,
    text_encoder: TextEncoder,
    tokenizer: Tokenizer,
    captions: list[str],
    accelerator: Accelerator,
) -> Callable[[list[str]], Tensor]:
    """What the network is given of captions: their ids, or their contexts, encoded once."""

    def ids(captions: list[str]) -> Tensor:
        return tokenizer(captions).ids

    def contexts(captions: list[str]) -> Tensor:
        """In the dtype that the U-Net is about to multiply them in, so that nothing is lost by the cache."""
        with accelerator.autocast():
            encoded: Tensor = text_encoder(ids(captions).to(accelerator.device))
        return encoded.to(DTYPES[accelerator.mixed_precision])

    return CachedContexts(contexts, captions) if config.cache_contexts else ids


def finished_model(
    config: UNetTrainingConfig, network: Conditioned, tokenizer: Tokenizer, captions: list[str]
) -> Model:
    """What is written: the network, which takes contexts as they are, with all that it was trained on and for."""
    unet, whitening = network.unet, network.whitening
    pixels = IdentityAutoencoder(IdentityAutoencoderConfig(latent_channels=config.model.in_channels))
    words = tuple(sorted(set().union(*map(words_in, set(captions)))))
    return Model(
        unet=unet if whitening is None else whitening.folded(unet),
        autoencoder=pixels if config.autoencoder is None else load_autoencoder(Path(config.autoencoder) / "vae"),
        text_encoder=network.text_encoder,
        tokenizer=tokenizer,
        tokenizer_folder=config.text_folder / "tokenizer",
        scheduler=config.scheduler,
        settings=config.settings.model_copy(update={"words": words}),
    )


def train(config: UNetTrainingConfig) -> None:
    accelerator = make_accelerator(config.loop)
    out = Path(config.loop.out)
    tokenizer = Tokenizer.from_folder(config.text_folder / "tokenizer")
    check_parts(config)
    images = CaptionedImages(config.data, config.loop.seed)
    captions = images.captions()
    dataset: CaptionedDataset = images
    if config.autoencoder is not None:
        with accelerator.main_process_first():
            moments = cached_latents(images, Path(config.autoencoder) / "vae", out, accelerator.device)
        dataset = CaptionedLatents(moments, captions)
    check_size(config, config.data.size if config.autoencoder is None else moments.shape[-1])
    network = make_network(config, tokenizer, captions, accelerator.device)
    learning = [network.unet, network.text_encoder] if config.train_text_encoder else [network.unet]
    averaged = [(make_ema(part, config.loop, accelerator.device), part) for part in learning]
    followed = [ema.module for ema, _ in averaged]
    average = Conditioned(
        followed[0], followed[1] if config.train_text_encoder else network.text_encoder, network.whitening
    )
    optimizers = make_optimizers(network.unet, config.loop)
    if config.train_text_encoder:
        rate = config.loop.learning_rate * config.text_encoder_rate
        optimizers += make_optimizers(network.text_encoder, config.loop.model_copy(update={"learning_rate": rate}))
    model, *optimizers = accelerator.prepare(network, *optimizers)
    objective = Objective(
        config.objective,
        config.scheduler,
        "8-bit" if config.autoencoder is None else "continuous",
        config.loop.seed,
        accelerator,
        make_teacher(config, network.text_encoder, tokenizer, DTYPES[accelerator.mixed_precision]),
    )
    text_of = make_text(config, network.text_encoder, tokenizer, captions, accelerator)

    def train_step(batch: Batch) -> dict[str, Tensor]:
        seed = config.loop.seed
        x0 = batch.inputs if config.autoencoder is None else sample_posterior(batch, seed)
        text = text_of(with_dropout(batch, seed, config.objective.caption_dropout))
        with accelerator.accumulate(model):
            losses = objective(model, batch, x0, text)
            accelerator.backward(losses.mean())
            norm = apply_gradients(training, model, optimizers)
        return {"loss": losses.mean().detach(), "gradient_norm": norm}

    def sheet(file: Path) -> None:
        save_model(out / "model", finished_model(config, average, tokenizer, captions), torch.float16)
        pipe = TextToImagePipeline.from_pretrained(out / "model", device=accelerator.device)
        prompts = [caption for caption in captions if caption.strip()][:SHOWN] or ["a picture"]
        write_sheet(file, pipe(prompts, seed=0).images, columns=8)

    training = Training(accelerator, config.loop, dataset, optimizers, train_step, averaged, on_sample=sheet)
    if config.heldout is not None and accelerator.is_main_process:
        held_out = make_heldout(config, objective, tokenizer)
        training.measure = lambda: held_out(average)
    fit(training)
    if accelerator.is_main_process:
        save_model(out / "model", finished_model(config, average, tokenizer, captions), torch.float16)
    accelerator.end_training()


def main() -> None:
    config = parse_config(UNetTrainingConfig, (__doc__ or "").split("\n")[0])
    with one_line_errors():
        train(config)


if __name__ == "__main__":
    main()
