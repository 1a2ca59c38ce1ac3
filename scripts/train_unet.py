"""Train a text-to-image latent diffusion model: the U-Net and, unless told otherwise, the text encoder with it.

    accelerate launch scripts/train_unet.py --config scripts/configs/picturebook_unet.yaml

Needs an autoencoder (`train_autoencoder.py`) and a text encoder (`train_clip.py`), or a whole model's folder for both.
Without an autoencoder it trains on the pixels themselves.
Writes `OUT/model`, which `ldm render --model` and diffusers take. The same command again resumes; `--init FOLDER`
starts from another model's U-Net and text encoder. With `--objective.distill_guidance SCALE` it learns to do without
guidance what that model does with it.
"""

from pathlib import Path
from typing import Literal, Self

import torch
from accelerate import Accelerator
from cached_encodings import CachedContexts, CaptionedLatents, cached_latents, sample_posterior
from pydantic import BaseModel, Field, model_validator
from sheet import write_sheet
from torch import Tensor, nn

from autoencoder import IdentityAutoencoder, IdentityAutoencoderConfig
from ldm.denoiser import Denoiser, Network, make_denoiser
from ldm.guidance import classifier_free
from ldm.loss import Data, diffusion_loss, distillation_loss, hybrid_loss, variational_bound
from ldm.time_sampling import TimeSampler, draw, logit_normal
from ldm.training import randomness
from ldm.training.command_line import parse_config
from ldm.training.data import Batch, CaptionedDataset, CaptionedImages, DataConfig
from ldm.training.loop import LoopConfig, Training, apply_gradients, fit, make_accelerator, make_ema, make_optimizers
from ldm.training.whitening import Whitening
from ldm.unet import UNet, UNetConfig
from pipelines import TextToImagePipeline
from pipelines.errors import one_line_errors
from pipelines.loading import Model, load_autoencoder, load_text_encoder, load_unet, save_model
from pipelines.runtime import prepare
from pipelines.scheduler_config import SchedulerConfig
from pipelines.settings import Settings, words_in
from text_encoder import TextEncoder, Tokenizer

HELDOUT = 256
"""Pictures of `heldout` whose loss is measured."""
WHITENED = 4096
"""Captions, at most, whose contexts' mean and covariance are measured."""
CONTEXT_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ObjectiveConfig(BaseModel, frozen=True, extra="forbid"):
    """What is learned."""

    loss: Literal["simple", "hybrid", "bound"] = "simple"
    """The squared error, the variational bound, or the first with a little of the second (`ldm/loss.py`)."""
    times: Literal["uniform", "importance", "logit_normal"] = "uniform"
    """Importance: more of the times at which the loss is large. Logit-normal: more of the middle of the path, where
    shapes are made; this changes what is learned best (`ldm/time_sampling.py`)."""
    logit_mean: float = Field(0.0, allow_inf_nan=False)
    """Mean of the logit-normal times: the larger, the more of the noisy ones, where layouts and counts are settled."""
    min_snr_gamma: float | None = Field(None, gt=0)
    caption_dropout: float = Field(0.1, ge=0, le=1)
    """Share of captions that are replaced by the empty one, for classifier-free guidance; 1 ignores all captions."""
    distill_guidance: float | None = Field(None, allow_inf_nan=False)
    """Learn, in place of the data, what the model in `init` makes of it with guidance of this scale. What is written
    wants guidance 1: one evaluation a step, where `init` needs two. Negative prompts mean nothing to it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.times != "logit_normal" and self.logit_mean != 0:
            raise ValueError(
                f"logit_mean shifts times that are logit_normal, but times is {self.times}: leave one of them out"
            )
        if self.loss == "bound" and self.min_snr_gamma is not None:
            raise ValueError(
                "min_snr_gamma weighs the squared error, which the loss 'bound' does not have: leave it out"
            )
        if self.distill_guidance is not None and (self.loss != "simple" or self.min_snr_gamma is not None):
            raise ValueError("distill_guidance is a loss of its own: leave out loss and min_snr_gamma")
        return self


class UNetTrainingConfig(BaseModel, frozen=True, extra="forbid"):
    data: DataConfig
    loop: LoopConfig
    autoencoder: str | None = None
    """A model folder: its `vae` is used. None trains on pixels."""
    text_encoder: str
    """A model folder: its `text_encoder` and `tokenizer` are used."""
    model: UNetConfig = UNetConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    settings: Settings = Settings()
    """Default steps and guidance of the model that is written."""
    train_text_encoder: bool = True
    text_encoder_rate: float = Field(1.0, gt=0, allow_inf_nan=False)
    """The text encoder's learning rate, as a share of the U-Net's. One that is trained already wants a small share."""
    cache_contexts: bool = False
    """Encode every distinct caption once, before training. Needs 77 x width numbers of memory each, and a text encoder
    that does not train."""
    whiten_contexts: bool = False
    """Train on contexts that vary alike in all directions (`ldm/training/whitening.py`), those of the text encoder as
    it was at the start. The model that is written takes them as they are."""
    heldout: str | None = None
    """Pictures that are not trained on, given as `data.path` is. Before the first step and with each sample sheet the
    averaged network's loss on the first 256 is logged, with their own captions and with others': the difference is what
    the words are worth."""
    init: str | None = None
    """A model folder whose U-Net and text encoder to start from."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        channels, wanted = (
            self.model.out_channels,
            self.model.in_channels * (2 if self.scheduler.learns_variance else 1),
        )
        if channels != wanted:
            raise ValueError(
                f"model.out_channels is {channels}, but must be {wanted} with scheduler.variance_type"
                f" {self.scheduler.variance_type}"
            )
        if self.text_encoder_rate != 1 and not self.train_text_encoder:
            raise ValueError("text_encoder_rate goes with train_text_encoder: true, or it says nothing")
        if self.cache_contexts and self.train_text_encoder:
            raise ValueError("cache_contexts goes with train_text_encoder: false, or the contexts would be out of date")
        if self.objective.distill_guidance is not None:
            if self.init is None:
                raise ValueError("objective.distill_guidance goes with init: say whose guidance to learn")
            if self.train_text_encoder:
                raise ValueError(
                    "objective.distill_guidance goes with train_text_encoder: false, for both must read alike"
                )
        return self


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


class Teacher:
    """The model in `init`, with guidance: `teacher(text)` is its denoiser, for the text that the student is given."""

    def __init__(self, config: UNetTrainingConfig, text_encoder: TextEncoder, tokenizer: Tokenizer) -> None:
        assert config.init is not None
        assert config.objective.distill_guidance is not None
        self.scale, self.text_encoder = config.objective.distill_guidance, text_encoder
        device = next(text_encoder.parameters()).device
        unet = load_unet(Path(config.init) / "unet")
        prepare(unet, device, torch.float32)
        self.denoise = make_denoiser(unet, config.scheduler.make_schedule(), config.scheduler.prediction)
        self.nothing = tokenizer([""]).ids.to(device)

    def __call__(self, text: Tensor) -> Denoiser:
        """text is token ids [B,L] or the context [B,L,D] that they were encoded to."""
        context = text if text.is_floating_point() else self.text_encoder(text)
        uncond = self.text_encoder(self.nothing).to(context)
        return classifier_free(self.denoise, context, uncond.expand_as(context), self.scale)


class Objective:
    """The loss of a batch of x0, at the times that the config asks for. Its state is that of the times' sampler."""

    def __init__(self, config: UNetTrainingConfig, accelerator: Accelerator, teacher: Teacher | None = None) -> None:
        self.config, self.accelerator, self.teacher = config, accelerator, teacher
        self.schedule = config.scheduler.make_schedule()
        self.times = TimeSampler(self.schedule.steps)
        wanted = config.objective
        self.probabilities = logit_normal(self.schedule, wanted.logit_mean) if wanted.times == "logit_normal" else None
        self.seen: list[tuple[Tensor, Tensor]] = []
        """Times and losses of this step's micro-batches so far, over all processes."""
        accelerator.register_for_checkpointing(self.times)

    def __call__(self, model: Network, batch: Batch, x0: Tensor, text: Tensor) -> Tensor:
        """The loss of each sample, weighted as its time was drawn: [B]. All else that is random is drawn here."""
        seed, device = self.config.loop.seed, self.accelerator.device
        eps = randomness.normal(x0.shape[1:], seed, "noise", batch.step, batch.positions)
        t, weights = self._times(randomness.uniform(seed, "t", batch.step, batch.positions))
        x0, eps, t, text = (v.to(device) for v in (x0, eps, t, text))
        losses = self.losses(model, x0.contiguous(memory_format=torch.channels_last), eps, t, text)
        if self.config.objective.times == "importance":
            self._remember(t, losses.detach())
        return losses * weights.to(losses)

    def _times(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Times [B] and the weights of their losses [B]."""
        if self.probabilities is not None:
            return draw(self.probabilities, uniforms), torch.ones_like(uniforms)
        return self.times.sample(uniforms)

    def losses(self, model: Network, x0: Tensor, eps: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The loss of each sample at the given times: [B]."""
        objective, scheduler = self.config.objective, self.config.scheduler
        if self.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                guided = self.teacher(text)
            return distillation_loss(model, guided, x0, eps, t, text, self.schedule, scheduler.prediction)
        inputs = model, x0, eps, t, text, self.schedule, scheduler.prediction
        data: Data = "8-bit" if self.config.autoencoder is None else "continuous"
        match objective.loss:
            case "simple":
                return diffusion_loss(*inputs, objective.min_snr_gamma)
            case "hybrid":
                return hybrid_loss(*inputs, data, objective.min_snr_gamma)
            case "bound":
                return variational_bound(*inputs, "learned" if scheduler.learns_variance else "beta_tilde", data)

    def _remember(self, t: Tensor, losses: Tensor) -> None:
        self.seen.append(self.accelerator.gather((t, losses)))
        if self.accelerator.sync_gradients:
            # Only now, so that all of a step draws from the same probabilities, however it is divided.
            self.times.update(*(torch.cat(parts) for parts in zip(*self.seen, strict=True)))
            self.seen.clear()


class HeldOut:
    """Measures the loss on pictures that are not trained on: always with the same noise, at times spread evenly."""

    def __init__(self, objective: Objective, tokenizer: Tokenizer) -> None:
        config = objective.config
        assert config.heldout is not None
        self.objective = objective
        images = CaptionedImages(config.data.model_copy(update={"path": config.heldout}), config.loop.seed)
        count = min(HELDOUT, len(images))
        captions = images.captions()[:count]
        self.ids = tokenizer(captions).ids
        self.x0 = images.images(0, count)
        if config.autoencoder is not None:
            device = objective.accelerator.device
            moments = cached_latents(images, Path(config.autoencoder) / "vae", Path(config.loop.out), device)
            self.x0 = moments[:count].float().chunk(2, dim=1)[0]
        self.eps = randomness.normal(self.x0.shape[1:], config.loop.seed, "heldout", 0, range(count))
        self.t = ((torch.arange(count) + 0.5) * objective.schedule.steps / count).long()

    @torch.no_grad()
    def __call__(self, model: Network) -> dict[str, float]:
        ids = {"heldout_loss": self.ids, "heldout_loss_other_caption": self.ids.roll(1, 0)}
        return {name: self._mean(model, some) for name, some in ids.items()}

    def _mean(self, model: Network, ids: Tensor) -> float:
        accelerator = self.objective.accelerator
        losses = []
        for some in zip(*(v.to(accelerator.device).split(32) for v in (self.x0, self.eps, self.t, ids)), strict=True):
            with accelerator.autocast():
                losses.append(self.objective.losses(model, *some))
        return float(torch.cat(losses).mean())


def make_unet(config: UNetTrainingConfig, whitening: Whitening | None) -> UNet:
    """A new U-Net, or that of `config.init`, which may lack attention blocks: new ones start as the identity.

    It takes contexts whitened, if there is a whitening; that of `config.init` takes them raw.

    Raises ValueError if `init` is otherwise of another architecture than the config's.
    """
    if config.init is None:
        return UNet(config.model)
    trained = load_unet(Path(config.init) / "unet").float()
    for name, wanted in config.model:
        there = getattr(trained.config, name)
        if name in ("attention_head_dim", "num_attention_heads"):
            name, there, wanted = "attention_head_dim", trained.config.heads, config.model.heads
        if name in ("down_block_types", "up_block_types"):
            grown = len(there) == len(wanted) and all(
                new == old or new.startswith("CrossAttn") for old, new in zip(there, wanted, strict=True)
            )
            there = wanted if grown else there
        if name != "sample_size" and there != wanted:
            raise ValueError(f"init {config.init} has {name} {there}, but model.{name} is {wanted}: make them agree")
    if whitening is not None:
        trained = whitening.unfolded(trained)
    unet = UNet(config.model)
    unet.load_state_dict(trained.state_dict(), strict=False)  # what may be missing was checked above
    return unet


def train(config: UNetTrainingConfig) -> None:
    accelerator = make_accelerator(config.loop)
    out = Path(config.loop.out)
    text_folder = Path(config.init or config.text_encoder)
    tokenizer = Tokenizer.from_folder(text_folder / "tokenizer")
    images = CaptionedImages(config.data, config.loop.seed)
    captions = images.captions()
    dataset: CaptionedDataset = images
    if config.autoencoder is not None:
        with accelerator.main_process_first():
            moments = cached_latents(images, Path(config.autoencoder) / "vae", out, accelerator.device)
        dataset = CaptionedLatents(moments, captions)
    text_encoder = load_text_encoder(text_folder / "text_encoder").float().to(accelerator.device)
    whitening = whitening_of(text_encoder, tokenizer, captions) if config.whiten_contexts else None
    torch.manual_seed(config.loop.seed)  # initial weights; all later randomness is counted
    network = Conditioned(make_unet(config, whitening), text_encoder, whitening)
    network.text_encoder.requires_grad_(config.train_text_encoder)
    network.to(memory_format=torch.channels_last)
    learning = [network.unet, network.text_encoder] if config.train_text_encoder else [network.unet]
    averaged = [(make_ema(part, config.loop).to(accelerator.device), part) for part in learning]
    optimizers = make_optimizers(network.unet, config.loop)
    if config.train_text_encoder:
        rate = config.loop.learning_rate * config.text_encoder_rate
        optimizers += make_optimizers(network.text_encoder, config.loop.model_copy(update={"learning_rate": rate}))
    model, *optimizers = accelerator.prepare(network, *optimizers)
    distils = config.objective.distill_guidance is not None
    objective = Objective(config, accelerator, Teacher(config, text_encoder, tokenizer) if distils else None)

    def token_ids(captions: list[str]) -> Tensor:
        return tokenizer(captions).ids

    def context(captions: list[str]) -> Tensor:
        """In the dtype that the U-Net is about to multiply it in, so that nothing is lost by the cache."""
        with accelerator.autocast():
            encoded: Tensor = network.text_encoder(token_ids(captions).to(accelerator.device))
        return encoded.to(CONTEXT_DTYPES[accelerator.mixed_precision])

    text_of = CachedContexts(context, captions) if config.cache_contexts else token_ids

    def train_step(batch: Batch) -> dict[str, Tensor]:
        seed = config.loop.seed
        x0 = batch.inputs if config.autoencoder is None else sample_posterior(batch, seed)
        text = text_of(with_dropout(batch, seed, config.objective.caption_dropout))
        with accelerator.accumulate(model):
            losses = objective(model, batch, x0, text)
            accelerator.backward(losses.mean())
            norm = apply_gradients(training, model, optimizers)
        return {"loss": losses.mean().detach(), "gradient_norm": norm}

    pixels = IdentityAutoencoder(IdentityAutoencoderConfig(latent_channels=config.model.in_channels))

    def finished_model() -> Model:
        words = tuple(sorted(set().union(*map(words_in, set(captions)))))
        unet = averaged[0][0].module
        return Model(
            unet=unet if whitening is None else whitening.folded(unet),
            autoencoder=pixels if config.autoencoder is None else load_autoencoder(Path(config.autoencoder) / "vae"),
            text_encoder=averaged[1][0].module if config.train_text_encoder else network.text_encoder,
            tokenizer=tokenizer,
            tokenizer_folder=text_folder / "tokenizer",
            scheduler=config.scheduler,
            settings=config.settings.model_copy(update={"words": words}),
        )

    def sheet(file: Path) -> None:
        save_model(out / "model", finished_model(), torch.float16)
        pipe = TextToImagePipeline.from_pretrained(out / "model", device=accelerator.device)
        write_sheet(file, pipe(captions[:16], seed=0).images, columns=8)

    training = Training(accelerator, config.loop, dataset, optimizers, train_step, averaged, on_sample=sheet)
    if config.heldout is not None and accelerator.is_main_process:
        held_out = HeldOut(objective, tokenizer)
        followed = [ema.module for ema, _ in averaged]
        average = Conditioned(
            followed[0], followed[1] if config.train_text_encoder else network.text_encoder, whitening
        )
        training.measure = lambda: held_out(average)
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
