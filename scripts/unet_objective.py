"""What `train_unet.py` has the network learn, and how well it has learned it."""

from typing import Literal, Self

import torch
from accelerate import Accelerator
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from ldm.denoiser import Denoiser, Network, make_denoiser
from ldm.guidance import classifier_free
from ldm.loss import Data, diffusion_loss, distillation_loss, hybrid_loss, variational_bound
from ldm.posterior import Variance
from ldm.time_sampling import TimeSampler, draw, logit_normal
from ldm.training import randomness
from ldm.training.data import Batch
from ldm.unet import UNet
from pipelines.scheduler_config import SchedulerConfig
from text_encoder import TextEncoder


class ObjectiveConfig(BaseModel, frozen=True, extra="forbid"):
    """What is learned."""

    loss: Literal["simple", "hybrid", "bound"] = "simple"
    """The squared error, the variational bound, or the first with a little of the second (`ldm/loss.py`)."""
    times: Literal["uniform", "importance", "logit_normal"] = "uniform"
    """Importance: more of the times at which the loss is large. Logit-normal: more of the middle of the path, where
    shapes are made; this changes what is learned best (`ldm/time_sampling.py`)."""
    logit_mean: float = Field(0.0, allow_inf_nan=False)
    """Mean of the logit-normal times: the larger, the more of the noisy ones, where layouts and counts are settled."""
    logit_std: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Their standard deviation: the smaller, the more of the times at `logit_mean` and the fewer of others."""
    min_snr_gamma: float | None = Field(None, gt=0)
    caption_dropout: float = Field(0.1, ge=0, le=1)
    """Share of captions that are replaced by the empty one, for classifier-free guidance; 1 ignores all captions."""
    distill_guidance: float | None = Field(None, allow_inf_nan=False)
    """Learn, in place of the data, what the model in `init` makes of it with guidance of this scale. What is written
    wants guidance 1: one evaluation a step, where `init` needs two. Negative prompts mean nothing to it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.times != "logit_normal" and (self.logit_mean != 0 or self.logit_std != 1):
            name = "logit_mean" if self.logit_mean != 0 else "logit_std"
            raise ValueError(f"{name} is that of logit_normal times, but times is {self.times}: leave one of them out")
        if self.loss == "bound" and self.min_snr_gamma is not None:
            raise ValueError(
                "min_snr_gamma weighs the squared error, which the loss 'bound' does not have: leave it out"
            )
        if self.distill_guidance is not None and (self.loss != "simple" or self.min_snr_gamma is not None):
            raise ValueError("distill_guidance is a loss of its own: leave out loss and min_snr_gamma")
        return self


class Teacher:
    """A model with guidance: `teacher(text)` is its denoiser, for the text that the student is given."""

    def __init__(
        self, unet: UNet, text_encoder: TextEncoder, nothing: Tensor, scheduler: SchedulerConfig, scale: float
    ) -> None:
        """`nothing` [1,L] are the token ids of the empty prompt."""
        self.text_encoder, self.scale = text_encoder, scale
        with torch.no_grad():
            self.uncond = text_encoder(nothing)
        self.denoise = make_denoiser(unet, scheduler.make_schedule(), scheduler.prediction)

    @torch.no_grad()
    def __call__(self, text: Tensor) -> Denoiser:
        """text is token ids [B,L] or the context [B,L,D] that they were encoded to."""
        context = text if text.is_floating_point() else self.text_encoder(text)
        return classifier_free(self.denoise, context, self.uncond.to(context).expand_as(context), self.scale)


class Objective:
    """The loss of a batch of x0, at the times that the config asks for. Its state is that of the times' sampler."""

    def __init__(
        self,
        config: ObjectiveConfig,
        scheduler: SchedulerConfig,
        data: Data,
        seed: int,
        accelerator: Accelerator,
        teacher: Teacher | None = None,
    ) -> None:
        self.config, self.scheduler, self.data, self.seed = config, scheduler, data, seed
        self.accelerator, self.teacher = accelerator, teacher
        self.schedule = scheduler.make_schedule()
        self.times = TimeSampler(self.schedule.steps)
        logit = config.times == "logit_normal"
        self.probabilities = logit_normal(self.schedule, config.logit_mean, config.logit_std) if logit else None
        self.seen: list[tuple[Tensor, Tensor]] = []
        """Times and losses of this step's micro-batches so far, over all processes."""
        accelerator.register_for_checkpointing(self.times)

    def __call__(self, model: Network, batch: Batch, x0: Tensor, text: Tensor) -> Tensor:
        """The loss of each sample, weighted as its time was drawn: [B]. All else that is random is drawn here."""
        seed, device = self.seed, self.accelerator.device
        eps = randomness.normal(x0.shape[1:], seed, "noise", batch.step, batch.positions)
        t, weights = self._times(randomness.uniform(seed, "t", batch.step, batch.positions))
        x0, eps, t, text = (v.to(device, non_blocking=True) for v in (x0, eps, t, text))
        losses = self.losses(model, x0.contiguous(memory_format=torch.channels_last), eps, t, text)
        if self.config.times == "importance":
            self._remember(t, losses.detach())
        return losses * weights.to(losses, non_blocking=True)

    def _times(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Times [B] and the weights of their losses [B]."""
        if self.probabilities is not None:
            return draw(self.probabilities, uniforms), torch.ones_like(uniforms)
        return self.times.sample(uniforms)

    def losses(self, model: Network, x0: Tensor, eps: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The loss of each sample at the given times: [B]."""
        sample = x0, eps, t, text, self.schedule, self.scheduler.prediction
        if self.teacher is not None:
            return distillation_loss(model, self.teacher(text), *sample)
        match self.config.loss:
            case "simple":
                return diffusion_loss(model, *sample, self.config.min_snr_gamma)
            case "hybrid":
                return hybrid_loss(model, *sample, self.data, self.config.min_snr_gamma)
            case "bound":
                variance: Variance = "learned" if self.scheduler.learns_variance else "beta_tilde"
                return variational_bound(model, *sample, variance, self.data)

    def _remember(self, t: Tensor, losses: Tensor) -> None:
        self.seen.append(self.accelerator.gather((t, losses)))
        if self.accelerator.sync_gradients:
            # Only now, so that all of a step draws from the same probabilities, however it is divided.
            self.times.update(*(torch.cat(parts) for parts in zip(*self.seen, strict=True)))
            self.seen.clear()


class HeldOut:
    """Measures the loss on pictures that are not trained on: always with the same noise, at times spread evenly."""

    def __init__(self, objective: Objective, x0: Tensor, ids: Tensor) -> None:
        """Of pictures or latents x0 [N,...] and their captions' token ids [N,L]."""
        self.objective, self.x0, self.ids = objective, x0, ids
        count = len(x0)
        self.eps = randomness.normal(x0.shape[1:], objective.seed, "heldout", 0, range(count))
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
