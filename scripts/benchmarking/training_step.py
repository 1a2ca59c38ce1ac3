"""One training step of a U-Net as a workload: our loop's, diffusers' example's, and diffusers' U-Net in our loop."""

import os
from copy import deepcopy
from pathlib import Path

import torch
from cached_encodings import CaptionedLatents, sample_posterior
from torch import Tensor, nn
from unet_objective import Objective
from unet_training_config import UNetTrainingConfig

from benchmarking import rivals
from benchmarking.workloads import Setup, Side, Sides, ours_like, size_of
from ldm.loss import diffusion_loss
from ldm.training.data import Batch, DataConfig
from ldm.training.loop import (
    PRECISIONS,
    LoopConfig,
    Training,
    apply_gradients,
    make_accelerator,
    make_ema,
    make_optimizers,
)
from ldm.unet import UNet

DTYPES = (torch.float32, torch.bfloat16)


def training_step(setup: Setup, folder: Path) -> Sides:
    """A training step of the U-Net from cached latents and contexts, as `train_unet.py` composes it.

    "default" is the step of diffusers' example script in the same mixed precision, "tuned" its U-Net in our own step.
    Compared are gradients, "default" being those in float32 throughout. `folder` is for the trackers' files.

    Raises:
        ValueError: a dtype that is not for training.
    """
    if setup.dtype not in DTYPES:
        raise ValueError(f"--dtype is {setup.dtype}; training is measured in float32 or bfloat16")
    if setup.device.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    config = UNetTrainingConfig(
        data=DataConfig(path=str(folder)),
        loop=LoopConfig(out=str(folder), batch_size=setup.batch, mixed_precision=PRECISIONS[setup.dtype]),
        autoencoder=str(folder),
        text_encoder=str(folder),
        model=setup.preset.configs.unet,
        scheduler=setup.preset.scheduler,
        train_text_encoder=False,
    )
    accelerator = make_accelerator(config.loop)
    mean = setup.latents()
    context, _ = setup.contexts()
    context = context.to(setup.dtype)
    dataset = CaptionedLatents(torch.cat([mean, torch.full_like(mean, -4.0)], 1).cpu(), [""] * setup.batch)
    rows = list(range(setup.batch))
    batch = Batch(dataset.moments, dataset.captions, rows, rows, step=0)

    def our_side(network: nn.Module, followed: nn.Module) -> Side:
        network.train().requires_grad_(True)
        network.to(memory_format=torch.channels_last)  # before the gradient: what is compared is what is timed
        gradient = gradient_of(network, setup, context, setup.dtype)
        ema = make_ema(followed, config.loop, accelerator.device)
        model, *optimizers = accelerator.prepare(network, *make_optimizers(network, config.loop))
        objective = Objective(config.objective, config.scheduler, "continuous", config.loop.seed, accelerator)

        def train_step(batch: Batch) -> dict[str, Tensor]:
            x0 = sample_posterior(batch, config.loop.seed)
            with accelerator.accumulate(model):
                losses = objective(model, batch, x0, context)
                accelerator.backward(losses.mean())
                norm = apply_gradients(loop, model, optimizers)
            return {"loss": losses.mean().detach(), "gradient_norm": norm}

        loop = Training(accelerator, config.loop, dataset, optimizers, train_step, [(ema, followed)])

        def run() -> None:
            loop.train_step(batch)
            ema.update_parameters(followed)

        return Side(run, size_of(network, ema), probe=lambda: gradient)

    theirs = setup.preset.make("unet").to(setup.device)
    unet = ours_like(UNet, theirs)
    sides = {"ours": our_side(unet, unet)}
    if setup.against:
        tuned = deepcopy(theirs)
        theirs.train().requires_grad_(True)
        exact = gradient_of(rivals.AsNetwork(theirs), setup, context, torch.float32)
        step = rivals.example_training_step(theirs, setup.preset.process, accelerator, batch.inputs, context)
        sides["default"] = Side(step, 2 * size_of(theirs), probe=lambda: exact)
        sides["tuned"] = our_side(rivals.AsNetwork(tuned), tuned)
    return sides


def gradient_of(network: nn.Module, setup: Setup, context: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of the loss of all weights in the order of their names, by autocast to `dtype`."""
    x0, t = setup.latents(), torch.linspace(0, setup.preset.scheduler.num_train_timesteps - 1, setup.batch).long()
    eps = setup.noise(*x0.shape[1:], seed=3)
    process = setup.preset.scheduler.make_schedule(), setup.preset.scheduler.prediction
    with torch.autocast(setup.device.type, dtype, enabled=dtype != torch.float32):
        inputs = x0, eps, t.to(setup.device), context.to(dtype)
        loss = diffusion_loss(network, *inputs, *process).mean()
    named = sorted((name.removeprefix("unet."), weights) for name, weights in network.named_parameters())
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, [weights for _, weights in named])])
