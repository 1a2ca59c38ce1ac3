"""Train a text-to-image latent diffusion model: the U-Net and, unless told otherwise, the text encoder with it.

    accelerate launch scripts/train_unet.py --config scripts/configs/picturebook_unet.yaml

Needs an autoencoder (`train_autoencoder.py`) and a text encoder (`train_clip.py`), or a whole model's folder for both.
Writes `OUT/model`, which `ldm render --model` and diffusers take. The same command again resumes; `--init FOLDER`
starts from another model's U-Net and text encoder.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Self

import torch
from pydantic import BaseModel, Field, model_validator
from safetensors.torch import load_file, save_file
from sheet import write_sheet
from torch import Tensor, nn
from tqdm import tqdm

from autoencoder.bottleneck import DiagonalGaussian
from ldm.loss import diffusion_loss
from ldm.training import randomness
from ldm.training.command_line import parse_config
from ldm.training.data import Batch, CaptionedDataset, CaptionedImages, DataConfig, Place
from ldm.training.loop import LoopConfig, Training, apply_gradients, fit, make_accelerator, make_ema, make_optimizer
from ldm.unet import UNet, UNetConfig
from pipelines import TextToImagePipeline
from pipelines.errors import one_line_errors
from pipelines.loading import Model, load_autoencoder, load_text_encoder, load_unet, save_model
from pipelines.runtime import pick_dtype, prepare
from pipelines.scheduler_config import SchedulerConfig
from pipelines.settings import Settings, words_in
from text_encoder import TextEncoder, Tokenizer

CONTEXT_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ObjectiveConfig(BaseModel, frozen=True, extra="forbid"):
    """What is learned."""

    min_snr_gamma: float | None = Field(None, gt=0)
    caption_dropout: float = Field(0.1, ge=0, lt=1)
    """Share of captions that are replaced by the empty one, for classifier-free guidance."""


class UNetTrainingConfig(BaseModel, frozen=True, extra="forbid"):
    data: DataConfig
    loop: LoopConfig
    autoencoder: str
    """A model folder: its `vae` is used."""
    text_encoder: str
    """A model folder: its `text_encoder` and `tokenizer` are used."""
    model: UNetConfig = UNetConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    settings: Settings = Settings()
    """Default steps and guidance of the model that is written."""
    train_text_encoder: bool = True
    cache_contexts: bool = False
    """Encode every distinct caption once, before training. Needs 77 x width numbers of memory each, and a text encoder
    that does not train."""
    init: str | None = None
    """A model folder whose U-Net and text encoder to start from."""

    @model_validator(mode="after")
    def _check_cache(self) -> Self:
        if self.cache_contexts and self.train_text_encoder:
            raise ValueError("cache_contexts goes with train_text_encoder: false, or the contexts would be out of date")
        return self


class Conditioned(nn.Module):
    """U-Net and text encoder as one network: (x_t [B,C,h,w], t [B], text) -> output like x_t.

    The text is token ids [B,L], or the context [B,L,D] that they were encoded to beforehand.
    """

    def __init__(self, unet: UNet, text_encoder: TextEncoder) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        context = text if text.is_floating_point() else self.text_encoder(text)
        output: Tensor = self.unet(x_t, t, context)
        return output


class CaptionedLatents(CaptionedDataset):
    """The posterior moments [2C,h,w] of every picture, float16, encoded once and kept in a file of their own."""

    def __init__(self, moments: Tensor, captions: list[str]) -> None:
        self.moments = moments
        self.captions = captions
        self.workers = 0

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, place: Place) -> tuple[Tensor, str, Place]:
        return self.moments[place[0]].float(), self.captions[place[0]], place


@torch.no_grad()
def encode_all(images: CaptionedImages, folder: Path, device: torch.device) -> Tensor:
    """Moments [N,2C,h,w] of all pictures under the autoencoder in `folder`."""
    autoencoder = load_autoencoder(folder)
    prepare(autoencoder, device, pick_dtype(None, device))
    dtype = next(autoencoder.parameters()).dtype
    scale = autoencoder.config.scaling_factor
    moments = []
    for start in tqdm(range(0, len(images), 64), desc="encoding", unit="batch"):
        batch = images.images(start, min(start + 64, len(images))).to(device, dtype, memory_format=torch.channels_last)
        posterior = autoencoder.posterior(batch)
        scaled = torch.cat(
            [posterior.mean.float() * scale, posterior.logvar.float() + 2 * torch.tensor(scale).log()], 1
        )
        moments.append(scaled.half().cpu())
    return torch.cat(moments).contiguous()


def cached_latents(images: CaptionedImages, vae: Path, cache: Path, device: torch.device) -> Tensor:
    """`encode_all`, kept in a file named by the autoencoder's weights, the data and their fingerprint."""
    weights = (vae / "diffusion_pytorch_model.safetensors").read_bytes()
    key = f"{hashlib.sha256(weights).hexdigest()}/{images.config.path}/{images.config.size}/{images.rows._fingerprint}"
    file = cache / f"latents-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    if not file.exists():
        staged = file.with_suffix(".tmp")
        save_file({"moments": encode_all(images, vae, device)}, staged)
        staged.rename(file)
    return load_file(file)["moments"]


class CachedContexts:
    """captions -> contexts [B,L,D] on the CPU, of captions that were all encoded beforehand, and of ""."""

    @torch.no_grad()
    def __init__(self, encode: Callable[[list[str]], Tensor], captions: list[str]) -> None:
        distinct = sorted({"", *captions})
        self.row = {caption: row for row, caption in enumerate(distinct)}
        starts = tqdm(range(0, len(distinct), 64), desc="encoding captions", unit="batch")
        self.contexts = torch.cat([encode(distinct[start : start + 64]).cpu() for start in starts])

    def __call__(self, captions: list[str]) -> Tensor:
        return self.contexts[[self.row[caption] for caption in captions]]


def draw(batch: Batch, times: int, seed: int, caption_dropout: float) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """All that is random in a step: latents x0 from their posteriors, noise eps, times t [B], and captions or ""."""
    step, positions = batch.step, batch.positions
    posterior = DiagonalGaussian.from_moments(batch.inputs)
    shape = posterior.mean.shape[1:]
    x0 = posterior.sample(randomness.normal(shape, seed, "posterior", step, positions))
    eps = randomness.normal(shape, seed, "noise", step, positions)
    t = randomness.timesteps(times, seed, step, positions)
    dropped = randomness.uniform(seed, "caption", step, positions) < caption_dropout
    captions = ["" if drop else caption for caption, drop in zip(batch.captions, dropped, strict=True)]
    return x0, eps, t, captions


def train(config: UNetTrainingConfig) -> None:
    accelerator = make_accelerator(config.loop)
    out = Path(config.loop.out)
    vae = Path(config.autoencoder) / "vae"
    text_folder = Path(config.init or config.text_encoder)
    tokenizer = Tokenizer.from_folder(text_folder / "tokenizer")
    images = CaptionedImages(config.data, config.loop.seed)
    with accelerator.main_process_first():
        dataset = CaptionedLatents(cached_latents(images, vae, out, accelerator.device), images.captions())
    torch.manual_seed(config.loop.seed)  # initial weights; all later randomness is counted
    unet = UNet(config.model) if config.init is None else load_unet(Path(config.init) / "unet").float()
    network = Conditioned(unet, load_text_encoder(text_folder / "text_encoder").float())
    network.text_encoder.requires_grad_(config.train_text_encoder)
    network.to(memory_format=torch.channels_last)
    learning = [network.unet, network.text_encoder] if config.train_text_encoder else [network.unet]
    averaged = [(make_ema(part, config.loop.ema_decay).to(accelerator.device), part) for part in learning]
    optimizer = make_optimizer(network, config.loop)
    model, optimizer = accelerator.prepare(network, optimizer)
    schedule, prediction = config.scheduler.make_schedule(), config.scheduler.prediction

    def token_ids(captions: list[str]) -> Tensor:
        return tokenizer(captions).ids

    def context(captions: list[str]) -> Tensor:
        """In the dtype that the U-Net is about to multiply it in, so that nothing is lost by the cache."""
        with accelerator.autocast():
            encoded: Tensor = network.text_encoder(token_ids(captions).to(accelerator.device))
        return encoded.to(CONTEXT_DTYPES[config.loop.mixed_precision])

    text_of = CachedContexts(context, dataset.captions) if config.cache_contexts else token_ids

    def train_step(batch: Batch) -> dict[str, Tensor]:
        x0, eps, t, captions = draw(batch, schedule.steps, config.loop.seed, config.objective.caption_dropout)
        x0, eps, t, text = (v.to(accelerator.device) for v in (x0, eps, t, text_of(captions)))
        x0 = x0.contiguous(memory_format=torch.channels_last)
        with accelerator.accumulate(model):
            losses = diffusion_loss(model, x0, eps, t, text, schedule, prediction, config.objective.min_snr_gamma)
            accelerator.backward(losses.mean())
            norm = apply_gradients(training, model, optimizer)
        return {"loss": losses.mean().detach(), "gradient_norm": norm}

    def finished_model() -> Model:
        words = tuple(sorted(set().union(*map(words_in, set(dataset.captions)))))
        return Model(
            unet=averaged[0][0].module,
            autoencoder=load_autoencoder(vae),
            text_encoder=averaged[1][0].module if config.train_text_encoder else network.text_encoder,
            tokenizer=tokenizer,
            tokenizer_folder=text_folder / "tokenizer",
            scheduler=config.scheduler,
            settings=config.settings.model_copy(update={"words": words}),
        )

    def sheet(file: Path) -> None:
        save_model(out / "model", finished_model(), torch.float16)
        pipe = TextToImagePipeline.from_pretrained(out / "model", device=accelerator.device)
        chosen = dataset.captions[:16]
        write_sheet(file, pipe(chosen, seed=0).images, columns=8)

    training = Training(accelerator, config.loop, dataset, [optimizer], train_step, averaged, on_sample=sheet)
    fit(training)
    if accelerator.is_main_process:
        save_model(out / "model", finished_model(), torch.float16)
    accelerator.end_training()


def main() -> None:
    config = parse_config(UNetTrainingConfig, (__doc__ or "").split("\n")[0])
    with one_line_errors():
        train(config)


if __name__ == "__main__":
    main()
